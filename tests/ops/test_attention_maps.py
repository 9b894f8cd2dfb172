"""``attention_maps`` on every backend that is here, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from op_cases import assert_close
from torch import Tensor

from fastdg import ops


def truth(scores: Tensor, of_weights: Tensor, up: Tensor, direct: Tensor) -> list[Tensor]:
    z, a = scores.double().requires_grad_(), of_weights.double().requires_grad_()
    weights = z.softmax(-1)
    (of_scores,) = torch.autograd.grad(weights, z, a, create_graph=True)
    total = (of_scores * up.double()).sum() + (weights * direct.double()).sum()
    to, of_up = torch.autograd.grad(total, (z, a))
    return [weights.detach(), of_scores.detach(), of_up, to]


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4, 1), (3, 2, 197), (0, 2, 3), (2, 0, 3)])
def test_values(device: str, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        maps = 2 * torch.randn(4, *shape, dtype=dtype)
        got = ops.attention_maps(*maps.to(device), dtype)
        for one, two in zip(got, truth(*maps), strict=True):
            assert one.dtype == dtype
            assert_close(one, two, 1 + float(two.norm()))


def test_results_in_half_precision(device: str) -> None:
    maps = torch.randn(4, 2, 3, 7)
    got = ops.attention_maps(*maps.to(device), torch.bfloat16)
    for one, two in zip(got, truth(*maps), strict=True):
        assert one.dtype == torch.bfloat16
        assert float((one.double().cpu() - two).norm()) <= 1e-2 * float(two.norm())


def test_large_scores_do_not_overflow(device: str) -> None:
    maps = torch.randn(4, 2, 3, 7)
    maps[0] *= 1e4
    got = ops.attention_maps(*maps.to(device), torch.float32)
    for one, two in zip(got, truth(*maps), strict=True):
        assert_close(one, two, 1 + float(two.norm()))


def test_queries_that_see_few_keys_or_none(device: str) -> None:
    scores, *others = torch.randn(4, 2, 3, 7)
    scores[:, 0], scores[:, 1, 2:] = -torch.inf, -torch.inf
    found = ops.attention_maps(*(x.to(device) for x in (scores, *others)), torch.float32)
    assert not any(one[:, 0].any() for one in found)
    seen = scores[:, 1:].clone()
    wanted = truth(seen, *(x[:, 1:] for x in others))
    for one, two in zip(found, wanted, strict=True):
        assert_close(one[:, 1:], two, 1 + float(two.norm()))


def test_what_it_refuses() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="up"):
        ops.attention_maps(x, x, x[:1], x, torch.float32)
    with pytest.raises(ValueError, match="of_weights"):
        ops.attention_maps(x, x.double(), x, x, torch.float32)
