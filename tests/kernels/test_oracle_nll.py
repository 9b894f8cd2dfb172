"""The kernels of ``oracle_nll`` against float64: interpreted on the CPU."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import fastdg.ops  # noqa: F401  (makes the submodule below)
from fastdg.kernels import oracle_nll

reference = sys.modules["fastdg.ops.oracle_nll"]
# The interpreter computes with NumPy, which warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def maps(N: int, C: int, P: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    features, oracle = torch.randn(2, N, C, P).unbind()
    if layout == "tokens":
        features, oracle = (x.mT.contiguous().mT for x in (features, oracle))
    elif layout == "tokens first":
        features, oracle = (
            x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (features, oracle)
        )
    elif layout == "apart":
        features, oracle = features.mT.contiguous().mT, torch.cat([oracle, oracle], 2)[..., P:]
    return features.to(DEVICE), oracle.to(DEVICE), torch.randn(C, device=DEVICE)


def double(*args: Tensor) -> list[Tensor]:
    return [x.cpu().double() for x in args]


LAYOUTS = ["plain", "tokens", "tokens first", "apart"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (2, 300, 20), (2, 3, 2500), (0, 2, 3)])
def test_values_and_gradients(
    shape: tuple[int, int, int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle_nll, "parts", lambda programs, steps, *args: min(2, steps))
    args = maps(*shape, layout)
    values, squares = oracle_nll.oracle_nll(*args)
    expected = reference.reference(*double(*args))
    for actual, want in zip((values, squares), expected, strict=True):
        torch.testing.assert_close(actual.cpu().double(), want, rtol=1e-5, atol=1e-6)
    up = torch.randn(shape[0], device=DEVICE)
    got = oracle_nll.oracle_nll_backward(up, *args, squares)
    want = reference.reference_backward(*double(up, *args, squares))
    assert got[0].stride() == want[0].stride()
    for actual, one in zip(got, want, strict=True):
        torch.testing.assert_close(actual.cpu().double(), one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16])
def test_an_oracle_in_half_precision(student: torch.dtype) -> None:
    features, oracle, bias = maps(3, 20, 50, "plain")
    features, oracle = features.to(student), oracle.bfloat16()
    values, squares = oracle_nll.oracle_nll(features, oracle, bias)
    assert values.dtype == squares.dtype == torch.float32
    expected, _ = reference.reference(*double(features, oracle, bias))
    torch.testing.assert_close(values.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    up = torch.randn(3, device=DEVICE)
    grad, _ = oracle_nll.oracle_nll_backward(up, features, oracle, bias, squares)
    assert grad.dtype == student
    want, _ = reference.reference_backward(*double(up, features, oracle, bias, squares))
    torch.testing.assert_close(grad.cpu().double(), want, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_through(value: float) -> None:
    features, oracle, bias = maps(3, 4, 50, "plain")
    features[1, 2, 30] = value
    values, squares = oracle_nll.oracle_nll(features, oracle, bias)
    assert values.isfinite().tolist() == [True, False, True]
    assert squares.isfinite().logical_not().nonzero().tolist() == [[1, 2]]
