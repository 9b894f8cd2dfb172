"""Check and time fastdg on the GPU of this machine: one command, one file of JSON rows.

NOT YET RUN ON A GPU: its parts were run on a CPU with small sizes, so that its code is known to
work, but there is no result of it yet.

    python benchmarks/run_gpu.py --out benchmarks/results/gpu.jsonl

Rows, by "what":
- "error": each op on each backend there is, against float64 on the CPU: ||x - x64|| / ||x64||.
- "outer_moments": against one cuBLAS product of as many operations (T > 1: delta^T a over all N T
  rows), and against per-sample gradients that are stored and then reduced.
- "step": whole steps as ratios to forward + backward + optimizer step, and peak memory.
- "sync": whether a Fishr step waits for the device anywhere.
The ratio to reach stands in each row under "reach". Installed kernels are used as they are; nothing
is built.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg import ops
from fastdg.domains import partition
from fastdg.ops.window import sizes, unfold

Row = dict[str, Any]
THREE = (3, 3, 1, 1, 1, 1)


def time_ms(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median milliseconds of each, run in turns after two rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 2):
        for name, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(stop))
    return {name: statistics.median(t) for name, t in times.items()}


def tf32(allowed: bool) -> None:
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        backend.fp32_precision = "tf32" if allowed else "ieee"


def samples_of(N: int, device: str, D: int = 3) -> tuple[Tensor, Tensor]:
    """A partition of N samples that are dealt to D domains in turn."""
    losses = torch.zeros(N, device=device)
    found = partition(torch.arange(N) % D, losses, D)
    return found.order, found.offsets


def rows(N: int, T: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, list[int]]:
    return torch.randn(N, T, inputs), torch.randn(N, T, outputs), []


def conv(N: int, C: int, outputs: int, size: int, window: tuple[int, ...] = THREE) -> tuple:
    a = torch.randn(N, C, size, size)
    T = sizes(a.shape, window)[0]
    return a, torch.randn(N, outputs, T).transpose(1, 2), list(window)


def op_calls(device: str) -> Iterator[tuple[str, Callable[[Callable], Any]]]:
    """``(op and case, call)``; ``call(move)`` gives tensors from inputs passed through ``move``."""
    grads = torch.randn(50, 1000) + 10
    for name, (a, delta, window) in {
        "T=1": rows(50, 1, 300, 70),
        "T=5": rows(50, 5, 300, 70),
        "T=50": rows(50, 50, 300, 150),
        "conv": conv(20, 30, 70, 14),
        "conv, stride 2": conv(20, 30, 70, 15, (3, 3, 2, 2, 1, 1)),
    }.items():

        def differentiable(move: Callable, a: Tensor = a, delta: Tensor = delta, window=window):
            order, offsets = samples_of(len(a), move(a).device.type)
            leaves = [move(x).requires_grad_() for x in (a, delta)]
            moments = ops.outer_moments(*leaves, order, offsets, window)
            total = moments[0].sum() + moments[1].square().sum()
            return [*moments, *torch.autograd.grad(total, leaves)]

        def others(move: Callable, a: Tensor = a, delta: Tensor = delta, window=window):
            order, offsets = samples_of(len(a), move(a).device.type)
            at = move(a), move(delta), order, offsets, window
            # Threshold 0: a sign that a rounding decides would take a whole entry away.
            masked = ops.outer_agreement(*at[:4], move(torch.ones(3)), 0.0, window=window)
            norms = ops.outer_norms(*at[:2], window)
            return [ops.outer_domain(*at), ops.outer_gram(*at), norms, *masked]

        yield f"outer_moments and its gradient, {name}", differentiable
        yield f"outer_domain, outer_gram, outer_norms, outer_agreement, {name}", others

    def moments(move: Callable) -> list[Tensor]:
        order, offsets = samples_of(len(grads), move(grads).device.type)
        leaf = move(grads).requires_grad_()
        mean, variance = ops.moments(leaf, order, offsets)
        gap = ops.variance_gap([variance], [], torch.ones(3, device=leaf.device).bool(), 0.0)
        return [mean, variance, gap, *torch.autograd.grad(gap, leaf)]

    yield "moments, variance_gap and their gradients", moments

    embeddings, labels = torch.randn(128, 512), torch.randint(65, (128,))
    classes = F.normalize(torch.randn(65, 512), dim=1)
    anchors = F.normalize(torch.randn(65, 3, 512), dim=2)
    teacher = torch.randn(65, 3).softmax(1)

    def distances(move: Callable) -> list[Tensor]:
        leaf = move(embeddings).requires_grad_()
        tables = move(classes), move(anchors), move(teacher)
        absolute, relative = ops.text_distance(leaf, labels.to(leaf.device), *tables)
        total = absolute.sum() + relative.square().sum()
        return [absolute, relative, *torch.autograd.grad(total, leaf)]

    yield "text_distance and its gradient", distances


def errors(device: str) -> Iterator[Row]:
    """Every op and backend against float64."""
    tf32(False)
    torch.manual_seed(0)
    there = [b for b, (ok, _) in fastdg.backends().items() if ok]
    for name, call in op_calls(device):
        with ops.use_backend("reference"):
            exact = call(lambda x: x.double())
        for backend in there:
            if device == "cuda" and backend == "cpp":
                continue
            with ops.use_backend(backend):
                got = call(lambda x: x.to(device))
            error = max(
                ((x.double().cpu() - y).norm() / y.norm()).item()
                for x, y in zip(got, exact, strict=True)
            )
            yield {"what": "error", "op": name, "backend": backend, "error": error, "reach": 1e-5}


def outer(device: str, shapes: dict[str, tuple], turns: int) -> Iterator[Row]:
    """`outer_moments` against a product of as many operations, and against storing gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, (a, delta, window) in shapes.items():
            tf32(True)
            a, delta = a.to(device, dtype), delta.to(device, dtype)
            at = a, delta, *samples_of(len(a), device), window
            every = torch.arange(len(a), device=device).chunk(8)

            def stored(at: tuple = at, every: tuple = every) -> None:
                a, delta, _, _, window = at
                for part in every:
                    g = torch.bmm(delta[part].transpose(1, 2), unfold(a[part], window))
                    g.sum(0), g.square_().sum(0)

            x, d = unfold(a, window).flatten(0, 1).contiguous(), delta.flatten(0, 1).contiguous()
            ms = time_ms(
                {
                    "fastdg": lambda at=at: ops.outer_moments(*at),
                    "product": lambda x=x, d=d: d.t() @ x,
                    "stored": stored,
                },
                turns,
            )
            yield {
                "what": "outer_moments",
                "case": name,
                "dtype": str(dtype).removeprefix("torch."),
                "tflops": 2e-9 * x.numel() * d.shape[1] / ms["fastdg"],
                "rate to product": ms["product"] / ms["fastdg"],
                "times faster than stored": ms["stored"] / ms["fastdg"],
                "reach": {"rate to product": 0.5, "times faster than stored": 3},
                "ms": ms,
            }


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """ResNet-50 and ViT-B/16 of torchvision, else the small models of the other benchmarks."""
    try:
        from torchvision.models import resnet50, vit_b_16
    except ImportError:
        from models import ResNet18, ViT

        return {"resnet18": (ResNet18(), (3, 64, 64)), "vit, small": (ViT(), (3, 32, 32))}
    size = (3, 224, 224)
    return {"resnet50": (resnet50().eval(), size), "vit_b_16": (vit_b_16().eval(), size)}


def steps(
    device: str, model: nn.Module, shape: tuple[int, ...], N: int, autocast: bool
) -> dict[str, Callable[[], Any]]:
    """Plain step, Fishr on the head, variances of all layers, and Fishr on all layers."""
    x, y = torch.randn(N, *shape, device=device), torch.randint(10, (N,), device=device)
    domains = torch.arange(N) % 3  # on the CPU: the wrapper then needs to read nothing back
    kind = torch.device(device).type

    def cast() -> AbstractContextManager[Any]:
        return torch.autocast(kind, torch.bfloat16) if autocast else nullcontext()

    def losses() -> Tensor:
        with cast():
            return F.cross_entropy(model(x), y, reduction="none")

    base = torch.optim.SGD(model.parameters(), lr=1e-9)
    wrapped = {
        params: fastdg.Fishr(base, params=params, penalty_weight=1.0, anneal_steps=0, model=model)
        for params in ("head", "all")
    }

    def plain() -> None:
        base.zero_grad()
        losses().mean().backward()
        base.step()

    def fishr(params: str) -> None:
        opt = wrapped[params]
        opt.zero_grad()
        opt.backward(losses(), domains)
        opt.step()

    def variances() -> None:
        with fastdg.record(model, check=False) as tape:
            found = losses()
        fastdg.domain_moments(tape, found, domains)

    return {
        "plain": plain,
        "Fishr, head": lambda: fishr("head"),
        "variances, all layers": variances,
        "Fishr, all layers": lambda: fishr("all"),
    }


def whole(device: str, N: int, turns: int) -> Iterator[Row]:
    """Ratios of whole steps to the plain one, and what waits for the device."""
    reach = {"Fishr, head": 1.02, "variances, all layers": 1.5, "Fishr, all layers": 4.5}
    for name, (model, shape) in models().items():
        for autocast in (False, True):
            tf32(True)
            runs = steps(device, model.to(device), shape, N, autocast)
            ms, peak = time_ms(runs, turns), {}
            for run_name, run in runs.items():
                torch.cuda.reset_peak_memory_stats()
                run()
                peak[run_name] = torch.cuda.max_memory_allocated()
            for run_name, limit in reach.items():
                yield {
                    "what": "step",
                    "case": f"{name}, {'bf16 autocast' if autocast else 'TF32'}, N={N}",
                    "run": run_name,
                    "ratio": ms[run_name] / ms["plain"],
                    "memory": peak[run_name] / peak["plain"],
                    "reach": limit,
                    "ms": ms[run_name],
                }
        torch.cuda.set_sync_debug_mode("error")
        try:
            runs["Fishr, head"]()
            waits = "nowhere"
        except RuntimeError as error:
            waits = str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield {"what": "sync", "case": name, "waits": waits, "reach": "nowhere"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of JSON rows to write")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--turns", type=int, default=20, help="timed rounds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("run_gpu: torch.cuda.is_available() is False; this needs a CUDA device")
    N, turns = options.samples, options.turns
    machine = {
        "what": "machine",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastdg": fastdg.__version__,
        "backends": fastdg.backends(),
    }
    shapes = {
        "ViT-B/16 MLP": rows(N, 197, 768, 3072),
        "ViT-B/16 attention": rows(N, 197, 768, 768),
        "ResNet-50 3x3, stage 2": conv(N, 128, 128, 30),
        "ResNet-50 3x3, stage 3": conv(N, 256, 256, 16),
        "ResNet-50 3x3, stage 4": conv(N, 512, 512, 9),
        "ResNet-50 1x1, stage 3": conv(N, 1024, 256, 14, (1, 1, 1, 1, 1, 1)),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w") as file:
        for found in (
            [machine],
            errors("cuda"),
            outer("cuda", shapes, turns),
            whole("cuda", N, turns),
        ):
            for row in found:
                print(json.dumps(row), file=file, flush=True)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
