"""The kernel of many small tensors against float64: interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from fastdg import ops
from fastdg.kernels import foreach_moments

# The interpreter computes with NumPy, which warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = foreach_moments.foreach_moments


def lists(N: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Gradients of several shapes, and factors with one row a sample and with several; far from
    zero, where sums of squares would cancel."""
    grads = [(70,), (), (3, 5), (0,)]
    pairs = [((7,), (18,)), ((3, 70), (3, 2)), ((0, 4), (0, 3))]
    made = [
        [torch.randn(N, *shape) + 30 for shape in grads],
        [torch.randn(N, *shape) + 5 for shape, _ in pairs],
        [torch.randn(N, *shape) + 5 for _, shape in pairs],
    ]
    made[0].append(torch.randn(4, N).t())  # samples last
    return [[x.to(DEVICE, dtype) for x in tensors] for tensors in made]


@pytest.mark.parametrize("variance", [True, False])
@pytest.mark.parametrize("counts", [(5,), (3, 0, 1, 7), (0,)])
def test_many_tensors_in_one_launch(counts: Sequence[int], variance: bool) -> None:
    order = torch.randperm(sum(counts)).to(DEVICE)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]).to(DEVICE)
    given = lists(sum(counts), torch.float32)
    means, variances = kernel(order, offsets, *given, variance)
    exact = [[x.cpu().double() for x in tensors] for tensors in given]
    with ops.use_backend("reference"):
        expected = ops.foreach_moments(*exact, order.cpu(), offsets.cpu())
    for got, want in zip(means, expected[0], strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-6)
    assert len(variances) == (len(means) if variance else 0)
    for got, want in zip(variances, expected[1], strict=False):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-3, atol=1e-6)
        assert (got[offsets.diff() <= 1] == 0).all()


def test_what_is_not_finite_stays_where_it_is() -> None:
    order, offsets = torch.arange(6).to(DEVICE), torch.tensor([0, 3, 6]).to(DEVICE)
    for value in (float("nan"), float("inf")):
        grads = torch.randn(6, 20).to(DEVICE)
        grads[4, 17] = value
        (mean,), (variance,) = kernel(order, offsets, [grads], [], [], True)
        hit = torch.zeros(2, 20, dtype=torch.bool, device=DEVICE)
        hit[1, 17] = True
        assert torch.equal(~mean.isfinite(), hit)
        assert torch.equal(~variance.isfinite(), hit)


def test_what_the_kernel_takes() -> None:
    index = torch.arange(2)
    single, double = torch.ones(2, 3), torch.ones(2, 3).double()
    for grads in ([single], [double]):
        reason = foreach_moments.supports(index, index, grads, [], [], True)
        assert reason is not None and "not on cpu" in reason
