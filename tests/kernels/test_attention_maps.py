"""The kernel of ``attention_maps`` against float64: interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import fastdg.ops  # noqa: F401  (makes the submodule below)
from fastdg.kernels import attention_maps as kernel
from fastdg.ops.second.attention_maps import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(maps: list[Tensor], dtype: torch.dtype, tolerance: float) -> None:
    got = kernel.attention_maps(*maps, dtype)
    want = reference(*(x.double() for x in maps), torch.float64)
    for actual, one in zip(got, want, strict=True):
        assert actual.dtype == dtype
        assert actual.shape == one.shape
        assert float((actual.double() - one).norm()) <= tolerance * float(one.norm())


# A row of one score, one as long as a block, one longer than 1024, and no row
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4, 1), (1, 3, 64), (1, 2, 1030), (0, 2, 3)])
def test_values(shape: tuple[int, ...]) -> None:
    maps = [2 * x for x in torch.randn(4, *shape, device=DEVICE)]
    compare(maps, torch.float32, 1e-5)


def test_large_scores() -> None:
    scores, *others = torch.randn(4, 2, 3, 7, device=DEVICE)
    compare([1e4 * scores, *others], torch.float32, 1e-5)


def test_queries_that_see_few_keys_or_none() -> None:
    scores, *others = torch.randn(4, 2, 3, 7, device=DEVICE)
    scores[:, 0], scores[:, 1, 2:] = -torch.inf, -torch.inf
    compare([scores, *others], torch.float32, 1e-5)
    weights = kernel.attention_maps(scores, *others, torch.float32)[0]
    assert not weights[:, 0].any()


def test_results_in_half_precision() -> None:
    compare([*torch.randn(4, 2, 3, 7, device=DEVICE)], torch.bfloat16, 5e-3)


def test_strided_operands() -> None:
    maps = [x.mT for x in torch.randn(4, 2, 7, 3, device=DEVICE)]
    compare(maps, torch.float32, 1e-5)


def test_rows_of_no_scores() -> None:
    got = kernel.attention_maps(*torch.randn(4, 2, 3, 0, device=DEVICE), torch.float32)
    assert [x.shape for x in got] == [(2, 3, 0)] * 4


def test_which_rows_it_takes() -> None:
    longest = kernel.LONGEST
    rows = [torch.empty(1, 1, longest + 1, device=DEVICE)] * 4
    assert kernel.supports(*rows, torch.float32) == f"rows are longer than {longest}"
