"""Each op on each backend: against float64, and against cuBLAS or a copy of the same bytes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_models import FULL, ResNet50
from gpu_rig import Rig, Row, Run, nbytes
from gpu_steps import set_precision
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastdg.domains import partition
from fastdg.ops.dispatch.registry import OPS
from fastdg.ops.window import sizes, unfold

# Relative error by norm. tf32x3 products in fp32 are a little worse than fp32's.
REACH = 1e-5
THREE, POINT = (3, 3, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1)


def samples_of(N: int, device: str, D: int = 3) -> tuple[Tensor, Tensor]:
    """A partition of N samples that are dealt to D domains in turn."""
    found = partition(torch.arange(N) % D, torch.zeros(N, device=device), D)
    return found.order, found.offsets


def rows(N: int, T: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, list[int]]:
    return torch.randn(N, T, inputs), torch.randn(N, T, outputs), []


def conv(N: int, C: int, outputs: int, size: int, window: tuple[int, ...] = THREE) -> Any:
    a = torch.randn(N, C, size, size)
    T = sizes(a.shape, window)[0]
    return a, torch.randn(N, outputs, T).transpose(1, 2), list(window)


# -- errors --


def cases_of_tests() -> dict[str, tuple[Any, ...]]:
    """The arguments of every op that its tests have, too."""
    folder = Path(__file__).parents[1] / "tests" / "ops"
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location("cases_of_tests", folder / "cases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.arguments("cpu", False)


def backends(name: str, device: str) -> dict[str, Callable[..., Any]]:
    """What computes an op on this device: backend -> implementation; kernels interpreted on the
    CPU."""
    op = OPS[name]
    found: dict[str, Any] = {"reference": op.reference}
    if device == "cuda":
        here = {b: op.backends[b] for b in ("triton", "cuda") if b in op.backends}
        return found | {b: partial(_taking, *entry) for b, entry in here.items()}
    if "cpp" in op.backends:
        found["cpp"] = partial(_taking, *op.backends["cpp"])
    if (kernel := _interpreted().get(name)) is not None:
        found["triton"] = kernel
    return found


def _taking(implementation: Any, supports: Any, *args: Any) -> Any:
    if (reason := supports(*args)) is not None:
        raise TypeError(f"not taken: {reason}")
    return implementation(*args)


def _interpreted() -> dict[str, Callable[..., Any]]:
    from fastdg.kernels import implementations, launch

    def on_cpu(function: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with patch.object(launch, "processors", lambda device: 1):
                return function(*args)

        return run

    return {name: on_cpu(function) for name, function, _ in implementations(OPS)}


def several_tiles() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments whose products take several tiles, for the ops on outer products."""
    shapes = {
        "T=1": rows(50, 1, 300, 70),
        "T=50": rows(50, 50, 300, 150),
        "3x3": conv(20, 30, 70, 14),
        "3x3, stride 2": conv(20, 30, 70, 15, (3, 3, 2, 2, 1, 1)),
    }
    for case, (a, delta, window) in shapes.items():
        where = samples_of(len(a), "cpu")
        yield f"outer_moments, {case}", (a, delta, *where, window)
        yield f"outer_domain, {case}", (a, delta, *where, window)
        # Threshold 0: a sign that a rounding decides would take a whole entry away
        yield (
            f"outer_agreement, {case}",
            (a, delta, *where, torch.ones(3), 0.0, float("inf"), window),
        )


def error_row(rig: Rig, name: str, args: tuple[Any, ...]) -> Row:
    op = OPS[name.split(",")[0]]

    def fresh(move: Callable[[Tensor], Tensor]) -> Any:
        return tree_map(
            lambda x: move(x.detach().clone()) if isinstance(x, Tensor) else x, list(args)
        )

    wide = fresh(lambda x: x.double() if x.is_floating_point() else x)
    result = op.reference(*wide)
    # An op that writes to its arguments has them as results
    exact = [x.double() for x in tree_leaves((result, wide)) if isinstance(x, Tensor)]
    found: Row = {"reach": REACH, "errors": {}, "not taken": {}}
    for backend, run in backends(op.name, rig.device).items():
        given = fresh(lambda x: x.to(rig.device))
        try:
            out = run(*given)
        except TypeError as error:
            if "not taken" not in str(error):
                raise
            found["not taken"][backend] = str(error)
            continue
        got = [x.double().cpu() for x in tree_leaves((out, given)) if isinstance(x, Tensor)]
        found["errors"][backend] = max(
            ((x - y).norm() / y.norm().clamp(min=1e-30)).item()
            for x, y in zip(got, exact, strict=True)
        )
    return found


def error_rows(rig: Rig) -> dict[str, Callable[[], Row]]:
    torch.manual_seed(0)
    cases = cases_of_tests() | (dict(several_tiles()) if not rig.small else {})
    missing = OPS.keys() - {name.split(",")[0] for name in cases}
    assert not missing, f"ops without a case: {missing}"
    return {f"error: {name}": partial(error_row, rig, name, args) for name, args in cases.items()}


# -- rates --


def outer_row(rig: Rig, case: tuple[Any, ...], dtype: torch.dtype, op: str) -> Row:
    """Against one cuBLAS product of as many operations: delta^T a over all N T rows."""
    set_precision("tf32")
    a, delta, window = case
    a, delta = a.to(rig.device, dtype), delta.to(rig.device, dtype)
    where = samples_of(len(a), rig.device)
    x, d = unfold(a, window).flatten(0, 1).contiguous(), delta.flatten(0, 1).contiguous()
    args: tuple[Any, ...] = (a, delta, *where, window)
    if op == "outer_agreement":
        args = (a, delta, *where, torch.ones(3, device=rig.device), 1.0, float("inf"), window)
    ms = rig.time_ms({"fastdg": lambda: OPS[op](*args), "cuBLAS": lambda: d.t() @ x})
    flops = 2 * x.numel() * d.shape[1]
    out = OPS[op](*args)
    moved = nbytes(y for y in tree_leaves((args, out)) if isinstance(y, Tensor))
    return {
        "flops": flops,
        "bytes": moved,
        "ms": ms,
        "TFLOP/s": 1e-9 * flops / ms["fastdg"],
        "share of cuBLAS": ms["cuBLAS"] / ms["fastdg"],
    }


def copy_row(rig: Rig, make: Callable[[], tuple[Run, list[Any]]]) -> Row:
    """Against a copy that reads and writes as many bytes as the op's arguments and results have."""
    run, args = make()
    moved = nbytes(x for x in tree_leaves((args, run())) if isinstance(x, Tensor))
    source = torch.ones(max(1, moved // 8), device=rig.device)
    target = torch.empty_like(source)
    ms = rig.time_ms({"fastdg": run, "copy": lambda: target.copy_(source)})
    return {
        "bytes": moved,
        "ms": ms,
        "GB/s": 1e-6 * moved / ms["fastdg"],
        "share of copy": ms["copy"] / ms["fastdg"],
    }


def columns(rig: Rig, op: str, D: int) -> tuple[Run, list[Any]]:
    """An op on D gradients of all of ResNet-50's parameters."""
    with torch.device("meta"):
        network = ResNet50((1, 1), 8) if rig.small else ResNet50()
    shapes = [p.shape for p in network.parameters()]
    flat = [torch.randn(s, device=rig.device) for _ in range(D) for s in shapes]
    weights = torch.full((D,), 1 / D, device=rig.device)
    more: dict[str, list[Any]] = {
        "gram": [D],
        "combine": [weights],
        "agreement": [weights, 1.0, float("inf")],
    }
    args = [flat, *more[op]]
    return (lambda: OPS[op](*args)), args


def norm(rig: Rig, C: int, size: int) -> tuple[Run, list[Any]]:
    """Weights and biases of a frozen batch norm."""
    N = 6 if rig.small else FULL.samples
    x, delta = (torch.randn(N, C, size, size, device=rig.device) for _ in range(2))
    given = [t.flatten(2).unsqueeze(1) for t in (x, delta)]
    mean, variance = (torch.rand(1, 1, C, device=rig.device).expand(N, 1, C) for _ in range(2))
    args = [*given, mean, variance, False, 1e-5]
    return (lambda: OPS["norm_gradients"](*args)), args


def maps(rig: Rig, C: int, size: int) -> tuple[Run, list[Any]]:
    """MIRO's term of one layer."""
    N = 6 if rig.small else FULL.samples
    features, oracle = (torch.randn(N, C, size * size, device=rig.device) for _ in range(2))
    args = [features, oracle, torch.randn(C, device=rig.device)]
    return (lambda: OPS["oracle_nll"](*args)), args


def rate_rows(rig: Rig) -> dict[str, Callable[[], Row]]:
    N = 6 if rig.small else FULL.samples
    shapes: dict[str, Callable[[], Any]] = {
        "ViT-B/16 MLP": lambda: rows(N, 197, 768, 3072),
        "ViT-B/16 attention": lambda: rows(N, 197, 768, 768),
        "ResNet-50 3x3, stage 2": lambda: conv(N, 128, 128, 30),
        "ResNet-50 3x3, stage 3": lambda: conv(N, 256, 256, 16),
        "ResNet-50 3x3, stage 4": lambda: conv(N, 512, 512, 9),
        "ResNet-50 1x1, stage 3": lambda: conv(N, 1024, 256, 14, POINT),
    }
    if rig.small:
        shapes = {"rows": lambda: rows(N, 5, 40, 30), "3x3": lambda: conv(N, 4, 6, 9)}
    made: dict[str, Callable[[], Row]] = {}
    for op in ("outer_moments", "outer_domain", "outer_agreement"):
        for dtype in (torch.bfloat16, torch.float32):
            for case, shape in shapes.items():
                name = f"rate: {op}, {case}, {str(dtype).removeprefix('torch.')}"
                made[name] = lambda s=shape, t=dtype, o=op: outer_row(rig, s(), t, o)
    for op in ("gram", "combine", "agreement"):
        for D in (3, 6, 16):
            name = f"rate: {op}, ResNet-50's gradients, D={D}"
            made[name] = partial(copy_row, rig, partial(columns, rig, op, D))
    for C, size in ((256, 56), (2048, 7)):
        at = (C, size) if not rig.small else (8, 5)
        where = f"{C} channels, {size}x{size}"
        made[f"rate: norm_gradients, {where}"] = partial(copy_row, rig, partial(norm, rig, *at))
        made[f"rate: oracle_nll, {where}"] = partial(copy_row, rig, partial(maps, rig, *at))
    return made


def product_row(rig: Rig) -> Row:
    """The device's ceilings: a large product, and a large copy."""
    n = 256 if rig.small else 8192
    a, b = (torch.randn(n, n, device=rig.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(n * n, device=rig.device)
    target = torch.empty_like(source)
    ms = rig.time_ms({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    return {
        "ms": ms,
        "TFLOP/s": 2e-9 * n**3 / ms["product"],
        "GB/s": 1e-6 * nbytes([source, target]) / ms["copy"],
    }


def run(rig: Rig) -> int:
    set_precision("fp32")
    left = rig.fill("ops", {"ceilings": partial(product_row, rig), **error_rows(rig)})
    return left + rig.fill("ops", rate_rows(rig))
