"""The kernels of ``norm_gradients`` against float64: interpreted on the CPU."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import fastdg.ops  # noqa: F401  (makes the submodule below)
from fastdg.kernels import norm_gradients

reference = sys.modules["fastdg.ops.norm_gradients"]
# The interpreter computes with NumPy, which warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# N, T, C, S, G
SHAPES = [
    (3, 1, 6, 7, 3),
    (1, 3, 300, 1, 1),
    (1, 1, 1, 1, 1),
    (1, 1, 6, 700, 3),
    (2, 3, 9, 5, 9),
    (0, 2, 4, 3, 2),
    (2, 0, 4, 3, 2),
]
LAYOUTS = ["plain", "channels last", "rows first", "apart"]
KINDS = ["rms", "fixed", "variance", "product"]


def arguments(shape: tuple[int, ...], layout: str, kind: str) -> tuple[object, ...]:
    N, T, C, S, G = shape
    x, delta = (torch.randn(2, N, T, C, S) + 0.3).unbind()
    if layout == "channels last":
        x, delta = (t.mT.contiguous().mT for t in (x, delta))
    elif layout == "rows first":
        x, delta = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, delta))
    elif layout == "apart":
        x, delta = x.mT.contiguous().mT, torch.cat([delta, delta], 3)[..., S:]
    mean, rstd = torch.randn(N, T, G), torch.rand(N, T, G) + 0.5
    if kind in ("fixed", "variance"):
        mean, rstd = (s[:1, :1].expand(N, T, G) if N * T else s for s in (mean, rstd))
    x, delta, mean, rstd = (t.to(DEVICE) for t in (x, delta, mean, rstd))
    given = {"product": (None, None), "rms": (None, rstd)}.get(kind, (mean, rstd))
    return x, delta, *given, kind in ("norm", "rms"), 0.1 if kind == "variance" else None


def double(*args: object) -> list[object]:
    return [x.cpu().double() if isinstance(x, Tensor) else x for x in args]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [*(("norm", layout) for layout in LAYOUTS), *((kind, "channels last") for kind in KINDS)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(
    shape: tuple[int, ...], kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_gradients, "parts", lambda programs, steps, *args: min(2, steps))
    args = arguments(shape, layout, kind)
    up = torch.randn(2, shape[0], shape[2], device=DEVICE)
    gain, coming = torch.rand(shape[2], device=DEVICE), args[0] * 0.5 + args[1]  # type: ignore[operator]
    got = list(norm_gradients.norm_gradients(*args))
    want = list(reference.reference(*double(*args)))
    for more in ((None, None), (None, coming), (gain, coming)):
        got += norm_gradients.norm_gradients_backward(*up, *args, *more)
        want += reference.reference_backward(*double(*up, *args, *more))
    for actual, one in zip(got, want, strict=True):
        torch.testing.assert_close(actual.cpu().double(), one, rtol=1e-4, atol=1e-4)
    assert [one.stride() for one in got[2:]] == [one.stride() for one in want[2:]]


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16])
def test_half_precision(student: torch.dtype) -> None:
    x, delta, *rest = arguments((2, 1, 12, 70, 3), "plain", "norm")
    args = x.to(student), delta.bfloat16(), *rest
    up = torch.randn(2, 2, 12, device=DEVICE)
    got = norm_gradients.norm_gradients(*args)
    for actual, want in zip(got, reference.reference(*double(*args)), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.cpu().double(), want, rtol=1e-4, atol=1e-4)
    args = *up, *args, torch.rand(12, device=DEVICE, dtype=student), x.to(student) * 2
    got = norm_gradients.norm_gradients_backward(*args)
    assert [found.dtype for found in got] == [student, torch.bfloat16, torch.float32]
    for actual, one in zip(got, reference.reference_backward(*double(*args)), strict=True):
        torch.testing.assert_close(actual.cpu().double(), one, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_through(value: float) -> None:
    args = arguments((3, 2, 4, 50, 2), "plain", "norm")
    args[1][1, 1, 2, 30] = value  # type: ignore[index]
    for found in norm_gradients.norm_gradients(*args):
        assert found.isfinite().logical_not().nonzero().tolist() == [[1, 2]]


def test_a_variance_without_eps() -> None:
    """Lanes beyond the edge have none, and 0 * inf is NaN."""
    x, delta, mean, variance, own, _ = arguments((2, 1, 5, 7, 5), "plain", "variance")
    args = x, delta, mean, variance, own, 0.0
    for actual, want in zip(
        norm_gradients.norm_gradients(*args), reference.reference(*double(*args)), strict=True
    ):
        torch.testing.assert_close(actual.cpu().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["norm", "rms", "variance"])
def test_many_norms_take_a_launch_for_each_layout(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = (2, 3, 6, 8, 3)
    shapes = [often, often, often, (0, 1, 4, 8, 2), often, often]
    given = [arguments(shape, "plain", kind) for shape in shapes]
    x, delta, mean, rstd, _, eps = (list(parts) for parts in zip(*given, strict=True))
    flat = delta[1].flatten()
    delta[1] = torch.cat([flat[:1], flat])[1:].view_as(x[1])  # starts at no multiple of 16 bytes
    x[4], delta[5] = x[4].half(), delta[5].half()
    launched: list[int] = []

    def count(kernel: object, programs: int, *args: object, **meta: object) -> None:
        launched.append(programs)
        launch(kernel, programs, *args, **meta)

    launch = norm_gradients.launch
    monkeypatch.setattr(norm_gradients, "launch", count)
    means = [] if mean[0] is None else mean
    got = norm_gradients.foreach_norm_gradients(
        x, delta, means, rstd, [] if eps[0] is None else eps
    )
    assert len(launched) == 5
    for k, found in enumerate(zip(*got, strict=True)):
        want = reference.reference(*double(x[k], delta[k], mean[k], rstd[k]), False, eps[k])
        for actual, one in zip(found, want, strict=True):
            torch.testing.assert_close(actual.cpu().double(), one, rtol=1e-4, atol=1e-4)
