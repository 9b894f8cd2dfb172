"""What an H100 or H200 should need, by counts of operations and bytes: no measurement.

Each step is counted on fake tensors (`gpu_fake`). An op takes the larger of two times: bytes (each
operand read once, each result written once) by the memory's rate, and operations by the matrix
units' rate, both from the data sheet. The floor is the plain step, the operations it lacks, and the
results of fastdg's ops written and read once. As counted is the sum over the ops that the code
dispatches now. Expected is that at the shares of these rates in `SHARES`, which are assumptions,
and no less than `HOST_US`, assumed too, for each dispatch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gpu_fake import Count, Work, counted, routed
from gpu_models import FULL, NETWORKS, SMALL
from gpu_rig import Rig
from gpu_steps import INNER, PENALTY, PLAIN, STATISTIC, STEPS, training

RESULTS = Path(__file__).with_name("results") / "gpu_predictions.json"
# NVIDIA's data sheets of the SXM parts: bytes/s, dense operations/s by dtype
MATRIX = {torch.bfloat16: 989.4e12, torch.float32: 494.7e12}  # bf16; TF32
DEVICES = {"H100 SXM": 3.35e12, "H200 SXM": 4.8e12}
# Assumed: achieved shares of these rates, by libraries and by fastdg's kernels
SHARES = {
    "library, bytes": 0.85,
    "library, operations": 0.65,
    "fastdg, bytes": 0.80,
    "fastdg, operations": 0.40,
}
HOST_US = {"op of PyTorch": 5.0, "op of fastdg": 25.0, "kernel of fastdg": 10.0}  # assumed, too
PRECISION = "bf16"
REACH = {
    "Fishr(head)": 1.02,
    STATISTIC: 1.3,
    PENALTY: 4.2,
    "AgrSum": 1.08,
    "PCGrad": 1.08,
    "MIRO": 1.36,
}
FISH_MS = 0.5
LAYERS = {  # N, T, inputs, outputs of products; those of convolutions count their patches
    "ViT-B/16 MLP": (96, 197, 768, 3072),
    "ViT-B/16 attention": (96, 197, 768, 768),
    "ResNet-50 3x3, stage 2": (96, 784, 1152, 128),
    "ResNet-50 3x3, stage 3": (96, 196, 2304, 256),
    "ResNet-50 3x3, stage 4": (96, 49, 4608, 512),
    "ResNet-50 1x1, stage 3": (96, 196, 1024, 256),
}
PRODUCT_REACH, COLUMNS_REACH, D = 0.60, 0.88, 3


def seconds(work: list[Work], memory: float, assumed: bool) -> float:
    """Time of ops one after the other."""
    total = 0.0
    for op in work:
        who = "fastdg" if op.own else "library"
        by_bytes = op.bytes / memory
        by_flops = op.flops / MATRIX.get(op.dtype or torch.float32, MATRIX[torch.float32])
        if assumed:
            by_bytes /= SHARES[f"{who}, bytes"]
            by_flops /= SHARES[f"{who}, operations"]
        total += max(by_bytes, by_flops)
    return total


def host_seconds(count: Count) -> float:
    number = sum(count.ops.values()), sum(count.own.values()), sum(count.launches.values())
    return 1e-6 * sum(n * us for n, us in zip(number, HOST_US.values(), strict=True))


def count_step(name: str, step: str, size: Any = FULL) -> Count:
    with routed():
        on = training(step, name, size, PRECISION, "cpu")
        return counted(STEPS[step](on), on.held)


def said(count: Count) -> dict[str, Any]:
    """A count as the file holds it."""
    return {
        "dispatched": count.dispatched,
        "ops of fastdg": dict(count.own),
        "kernels of fastdg": sum(count.launches.values()),
        "GB": round(1e-9 * sum(op.bytes for op in count.work), 2),
        "TFLOP": round(1e-12 * sum(op.flops for op in count.work), 3),
        "GB of fastdg": round(1e-9 * sum(op.bytes for op in count.work if op.own), 2),
        "TFLOP of fastdg": round(1e-12 * sum(op.flops for op in count.work if op.own), 3),
        "peak GB": round(1e-9 * count.peak, 2),
    }


def step_row(count: Count, unit: Count, memory: float) -> dict[str, Any]:
    ideal, base = (seconds(c.work, memory, False) for c in (count, unit))
    results = sum(op.written for op in count.work if op.own)
    lacking = sum(op.flops for op in count.work) - sum(op.flops for op in unit.work)
    floor = base + 2 * results / memory + max(0, lacking) / MATRIX[torch.bfloat16]
    busy, busy_base = (seconds(c.work, memory, True) for c in (count, unit))
    host, host_base = host_seconds(count), host_seconds(unit)
    expected, expected_base = max(busy, host), max(busy_base, host_base)
    bound = "the host's dispatch" if host > busy else "the device"
    extra = sum(op.bytes for op in count.work) - sum(op.bytes for op in unit.work)
    return {
        "floor": round(floor / base, 3),
        "floor ms": round(1e3 * floor, 2),
        "as counted": round(ideal / base, 3),
        "expected": round(expected / expected_base, 3),
        "expected ms": round(1e3 * expected, 2),
        "difference ms": round(1e3 * (expected - expected_base), 2),
        "host ms": round(1e3 * host, 2),
        "why": f"{1e-9 * extra:+.1f} GB and {1e-12 * lacking:+.2f} TFLOP on the unit's; "
        f"{count.dispatched} ops against {unit.dispatched}; bound by {bound}",
    }


def product_rows(memory: float) -> dict[str, Any]:
    """`outer_moments` against the product of as many operations, in bf16."""
    found = {}
    rate = MATRIX[torch.bfloat16]
    for name, (N, T, inputs, outputs) in LAYERS.items():
        flops = 2 * N * T * inputs * outputs
        read, written = 2 * N * T * (inputs + outputs), inputs * outputs
        library = max(flops / rate, (read + 2 * written) / memory)
        ours = max(flops / rate, (read + 2 * 4 * D * written) / memory)
        share = SHARES["fastdg, operations"] / SHARES["library, operations"]
        found[f"outer_moments: {name}"] = {
            "floor": round(library / ours, 3),
            "expected": round(share * library / ours, 3),
            "reach": PRODUCT_REACH,
            "why": f"{1e-9 * flops:.0f} GFLOP either way; {1e-6 * read:.0f} MB read, and "
            f"{1e-6 * 8 * D * written:.0f} MB written against {1e-6 * 2 * written:.0f}",
        }
    return found


def columns_row(memory: float) -> dict[str, Any]:
    share = SHARES["fastdg, bytes"] / SHARES["library, bytes"]
    return {
        "floor": 1.0,
        "expected": round(share, 3),
        "reach": COLUMNS_REACH,
        "why": "each gradient is read once and each result written once, as a copy does",
    }


def predictions(small: bool = False) -> dict[str, Any]:
    size = SMALL if small else FULL
    counts = {name: {step: count_step(name, step, size) for step in STEPS} for name in NETWORKS}
    devices: dict[str, Any] = {}
    for device, memory in DEVICES.items():
        rows: dict[str, Any] = {}
        for name, of in counts.items():
            for step, reach in REACH.items():
                rows[f"{name}, {PRECISION}: {step}"] = {
                    **step_row(of[step], of[PLAIN], memory),
                    "reach": reach,
                }
            fish = step_row(of["Fish"], of[INNER], memory)
            rows[f"{name}, {PRECISION}: Fish"] = {**fish, "reach ms": FISH_MS}
        rows |= product_rows(memory)
        rows["columns, share of a copy"] = columns_row(memory)
        devices[device] = rows
    return {
        "what": "predictions, from counts; nothing here was measured",
        "command": "python benchmarks/gpu.py predict --out FOLDER",
        "batch": {"samples": size.samples, "pixels": size.pixels, "domains": size.domains},
        "data sheet": {
            "bytes/s": DEVICES,
            "operations/s": {str(dtype)[6:]: rate for dtype, rate in MATRIX.items()},
        },
        "assumed": {"shares": SHARES, "host us": HOST_US},
        "devices": devices,
        "counts": {n: {s: said(c) for s, c in of.items()} for n, of in counts.items()},
    }


def rendered(found: dict[str, Any]) -> str:
    """The same as a short text."""
    batch = found["batch"]
    lines = [
        "# Predicted for a GPU, not measured",
        "",
        f"By `{found['command']}`, from counts on fake tensors: {batch['samples']} samples, "
        f"{batch['pixels']} px, {batch['domains']} domains, {PRECISION} autocast, fused Adam. "
        "fastdg has never run on a GPU. An op takes its bytes by the data sheet's rate of the "
        "memory, or its operations by the matrix units', whichever is longer. Floor: the plain "
        "step, the operations it lacks, and the results of fastdg's ops written and read once. As "
        "counted: the sum of the ops now dispatched. Expected: that at assumed shares of the rates "
        f"({'; '.join(f'{k} {v:.0%}' for k, v in SHARES.items())}), or the host's time at assumed "
        f"{', '.join(f'{v:g} us for each {k}' for k, v in HOST_US.items())}. "
        "`python benchmarks/gpu.py table` puts measured rows beside these.",
    ]
    for device, rows in found["devices"].items():
        lines += ["", f"## {device}", "", "| | to reach | floor | as counted | expected | why |"]
        lines.append("|---|---:|---:|---:|---:|---|")
        for name, row in rows.items():
            if "reach ms" in row:
                reach, expected = f"+{row['reach ms']} ms", f"{row['difference ms']:+.2f} ms"
            else:
                sign = "×" if ": Fishr" in name or ", bf16: " in name else ""
                bound = "≤" if sign else "≥"
                reach, expected = f"{bound} {row['reach']}{sign}", f"{row['expected']}{sign}"
            cells = [name, reach, row["floor"], row.get("as counted", "-"), expected, row["why"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "## Counts of a step", ""]
    lines.append("| | ops | of fastdg | its kernels | GB | TFLOP | peak GB |")
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, of in found["counts"].items():
        for step, c in of.items():
            own = sum(c["ops of fastdg"].values())
            cells = [c["dispatched"], own, c["kernels of fastdg"], c["GB"], c["TFLOP"]]
            lines.append(f"| {name}: {step} | {' | '.join(map(str, [*cells, c['peak GB']]))} |")
    return "\n".join(lines) + "\n"


def run(rig: Rig) -> int:
    """Write the file beside the committed results; a rehearsal into the folder of rows."""
    found = predictions(rig.small)
    path = RESULTS if not rig.small else rig.out / RESULTS.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(rendered(found))
    print(rendered(found))
    return 0
