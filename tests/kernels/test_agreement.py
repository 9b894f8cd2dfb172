"""The kernel of ``agreement`` against its reference: interpreted on the CPU."""

from __future__ import annotations

import math
import sys

import pytest
import torch

pytest.importorskip("triton")
import fastdg.ops  # noqa: F401  (makes the submodule below)
from fastdg.kernels import agreement

reference = sys.modules["fastdg.ops.agreement"].reference
# The interpreter computes with NumPy, which warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(0,), (2, 3), (), (1500,), (4, 0), (7, 300), (1024,), (0, 3)]


@pytest.mark.parametrize("steepness", [math.inf, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [1, 4])
def test_many_parameters_in_one_launch(D: int, dtype: torch.dtype, steepness: float) -> None:
    gradients = [torch.randn(shape).to(DEVICE, dtype) for _ in range(D) for shape in SHAPES]
    gradients[3] = torch.randn(3000).to(DEVICE, dtype)[::2]
    weights = torch.tensor([1.5, 0.0, -0.5, 1.0][:D]).to(DEVICE)
    rounding = 4 * torch.finfo(dtype).eps
    for threshold in (0.3, 1.0):
        args = weights, threshold, steepness
        got = agreement.agreement(gradients, *args)
        want = reference([g.float() for g in gradients], *args)
        for one, other in zip(got[0], want[0], strict=True):
            assert one.dtype == dtype and one.is_contiguous()
            torch.testing.assert_close(one, other.to(dtype), rtol=rounding, atol=1e-6)
        for one, other in zip(got[1:], want[1:], strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steepness", [math.inf, 4.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(value: float, steepness: float) -> None:
    gradients = [torch.randn(n).to(DEVICE) for _ in range(3) for n in (20, 5)]
    gradients[2][17] = value
    for weights in ((1.0, 0.5, 1.0), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0)):
        args = gradients, torch.tensor(weights).to(DEVICE), 0.2, steepness
        got, want = agreement.agreement(*args), reference(*args)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_what_the_kernel_takes() -> None:
    reason = agreement.supports([torch.ones(2), torch.ones(2)], torch.ones(2), 1.0, math.inf)
    assert reason is not None and "not on cpu" in reason
