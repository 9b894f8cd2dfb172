"""The table of a folder of rows: measured beside predicted, and what failed or is missing."""

from __future__ import annotations

import json
from typing import Any

from gpu_models import NETWORKS
from gpu_rig import Rig, Row
from gpu_step_rows import ORDER
from gpu_steps import INNER, STEPS

PARTS = ("build", "tests", "sanitizer", "ops", "steps", "waits")


def predicted(rig: Rig) -> dict[str, Any]:
    """The rows of the device that is most like this one."""
    from pathlib import Path

    path = Path(__file__).with_name("results") / "gpu_predictions.json"
    devices = json.loads(path.read_text())["devices"]
    name = next((r.get("name", "") for r in rig.rows("build") if r["row"] == "device"), "")
    return (
        next((rows for device, rows in devices.items() if device.split()[0] in name), {})
        or (devices["H200 SXM"])
    )


def latest(rows: list[Row]) -> dict[str, Row]:
    return {row["row"]: row for row in rows}


def number(value: Any, digits: int = 2) -> str:
    return (
        f"{value:.{digits}f}" if isinstance(value, float) else "-" if value is None else str(value)
    )


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join(map(number, row))} |" for row in rows)]


def steps(rig: Rig) -> list[str]:
    found, expected = latest(rig.rows("steps")), predicted(rig)
    rows = []
    for name in NETWORKS:
        for precision in ORDER:
            of_one = {k: r for k, r in found.items() if k.startswith(f"{name}, {precision}: ")}
            for key, row in of_one.items():
                said = expected.get(key, {})
                if key.endswith(": Fish") and "ms" in row:
                    difference = row["ms"] - row["unit ms"]
                    row = {**row, "ratio": f"{difference:+.2f} ms"}
                    said = {**said, "expected": f"{said.get('difference ms', 0):+.2f} ms"}
                    said["reach"] = f"+{said.get('reach ms')} ms"
                why = row.get("missing") or row.get("error", "")[:80]
                cells = [row.get(k) for k in ("ms", "ratio", "peak GB", "launches")]
                wanted = [said.get(k) for k in ("reach", "floor", "expected")]
                rows.append([key, *(cells if not why else [why, None, None, None]), *wanted])
    head = ["step", "ms", "of plain", "peak GB", "launches", "to reach", "floor", "expected"]
    return ["## Steps", "", f"Fish beside `{INNER}`.", "", *table(head, rows)]


def ops(rig: Rig) -> list[str]:
    found, expected = latest(rig.rows("ops")), predicted(rig)
    errors, rates = [], []
    for key, row in found.items():
        if key.startswith("error: "):
            worst = max(row.get("errors", {}).values(), default=None)
            good = "error" not in row and worst is not None and worst <= row["reach"]
            here = ", ".join(f"{b} {e:.1e}" for b, e in row.get("errors", {}).items())
            refused = ", ".join(row.get("not taken", {}))
            errors.append([key[7:], here or row.get("error", "")[:80], refused or None, good])
        elif key.startswith("rate: "):
            name = key[6:]
            said = expected.get(": ".join(name.removesuffix(", bfloat16").split(", ", 1)), {})
            if "share of copy" in row:
                said = expected.get("columns, share of a copy", {})
            share = row.get("share of cuBLAS", row.get("share of copy"))
            rate = row.get("TFLOP/s", row.get("GB/s"))
            rates.append([name, rate, share, *(said.get(k) for k in ("reach", "expected"))])
    head = ["op", "error", "does not take it", "within 1e-5"]
    return [
        *("## Ops", "", *table(head, errors), ""),
        *table(["op", "TFLOP/s or GB/s", "share", "to reach", "expected"], rates),
    ]


def others(rig: Rig) -> list[str]:
    lines = ["## Waits, captures, tests, build", ""]
    for part in ("waits", "tests", "sanitizer", "build"):
        for key, row in latest(rig.rows(part)).items():
            said = {k: v for k, v in row.items() if k not in ("row", "seconds")}
            text = json.dumps(said)
            lines.append(f"- {key}: {text if len(text) < 700 else text[:700] + ' ...'}")
    return lines


def run(rig: Rig) -> int:
    """Print the table and keep it beside the rows; names the parts without rows."""
    missing = [part for part in PARTS if not rig.rows(part)]
    lines = ["# On a GPU" if rig.device == "cuda" else "# Rehearsed on a CPU: no result", ""]
    if missing:
        lines += [f"No rows of: {', '.join(missing)}.", ""]
    lines += [*steps(rig), "", *ops(rig), "", *others(rig), ""]
    text = "\n".join(lines)
    rig.out.mkdir(parents=True, exist_ok=True)
    (rig.out / "table.md").write_text(text)
    print(text)
    return 0


assert set(STEPS)  # the steps' names are the predictions'
