"""The kernel of ``activation_derivative`` against float64: interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import fastdg.ops  # noqa: F401  (makes the submodule below)
from fastdg.kernels import activation_derivative as kernel
from fastdg.ops.second.activation_derivative import KINDS, reference

# The interpreter computes with NumPy, which warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(), (7,), (3, 1030), (0, 3)])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_values(kind: int, shape: tuple[int, ...]) -> None:
    x, delta, up = 3 * torch.randn(3, *shape, device=DEVICE)
    got = kernel.activation_derivative(x, delta, up, kind)
    want = reference(*(t.double() for t in (x, delta, up)), kind)
    for actual, one in zip(got, want, strict=True):
        torch.testing.assert_close(actual.double(), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_far_from_zero(kind: int) -> None:
    x = torch.tensor([-3e4, -200.0, -20.0, 20.0, 200.0, 3e4], device=DEVICE)
    got = kernel.activation_derivative(x, torch.ones_like(x), torch.ones_like(x), kind)
    want = torch.zeros_like(x), (x > 0).float()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)


def test_half_precision() -> None:
    x, delta, up = torch.randn(3, 300, device=DEVICE)
    maps = x.bfloat16(), delta, up.bfloat16()
    got = kernel.activation_derivative(*maps, 0)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32]
    for actual, one in zip(got, reference(*(t.double() for t in maps), 0), strict=True):
        torch.testing.assert_close(actual.double(), one, rtol=1e-2, atol=1e-3)
