"""The kernels of given per-sample gradients against float64: interpreted on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import fastdg.ops  # noqa: F401  (makes the submodule below)
from fastdg.kernels import moments

reference = sys.modules["fastdg.ops.moments"]
# The interpreter computes with NumPy, which warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def partition(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    return torch.randperm(sum(counts)).to(DEVICE), offsets.to(DEVICE)


def double(*args: Tensor) -> list[Tensor]:
    return [x.cpu().double() if x.is_floating_point() else x.cpu() for x in args]


def laid_out(grads: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return torch.cat([grads, grads], 1)[:, : grads.shape[1]]
    return grads.t().contiguous().t() if layout == "transposed" else grads


@pytest.mark.parametrize("counts", [(5,), (3, 0, 1, 7), (20, 33), (0,)])
@pytest.mark.parametrize("columns", [1, 15, 300])
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed"])
def test_moments(counts: tuple[int, ...], columns: int, layout: str) -> None:
    order, offsets = partition(counts)
    # Far from zero, where sums of squares would cancel.
    grads = laid_out(torch.randn(sum(counts), columns) + 1000, layout).to(DEVICE)
    mean, variance = moments.moments(grads, order, offsets)
    expected = reference.reference(*double(grads, order, offsets))
    torch.testing.assert_close(mean.cpu().double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.cpu().double(), expected[1], rtol=1e-3, atol=1e-6)
    assert (variance[offsets.diff() <= 1] == 0).all()

    up = torch.randn_like(mean), torch.randn_like(mean)
    args = *up, grads - 1000, mean - 1000, order, offsets
    grad = moments.moments_backward(*args)
    want = reference.reference_backward(*double(*args))
    torch.testing.assert_close(grad.cpu().double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_fp32(dtype: torch.dtype) -> None:
    order, offsets = partition((9, 4))
    grads = torch.randn(13, 40).to(DEVICE, dtype)
    results = moments.moments(grads, order, offsets)
    expected = reference.reference(*double(grads, order, offsets))
    for actual, want in zip(results, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.cpu().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("counts", [(1, 11), (10, 2)])
def test_what_is_not_finite_comes_through(value: float, counts: tuple[int, ...]) -> None:
    order, offsets = partition(counts)
    grads = torch.randn(12, 30, device=DEVICE)
    grads[order[0], 7] = value
    results = moments.moments(grads, order, offsets)
    expected = reference.reference(grads, order, offsets)
    for actual, want in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, want, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_samples_of_no_domain_have_no_gradient() -> None:
    order, offsets = torch.tensor([4, 1, 2], device=DEVICE), torch.tensor([0, 2, 3], device=DEVICE)
    mean, up = torch.randn(2, 9, device=DEVICE), torch.randn(2, 2, 9, device=DEVICE)
    grad = moments.moments_backward(*up, torch.randn(6, 9, device=DEVICE), mean, order, offsets)
    assert (grad[[0, 3, 5]] == 0).all()
    assert (grad[[1, 2, 4]] != 0).all()
