"""``activation_derivative`` on every backend that is here, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from op_cases import assert_close
from torch import Tensor
from torch.nn import functional as F

from fastdg import ops
from fastdg.ops.second.activation_derivative import KINDS, recorded

SHAPES = [(7,), (3, 1030), (2, 5, 4, 3), (0, 3), ()]


def of(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if "tanh" in kind else "none")


def truth(x: Tensor, delta: Tensor, up: Tensor, kind: str) -> tuple[Tensor, ...]:
    x, delta, up = (t.detach().cpu().double() for t in (x, delta, up))
    x, delta = x.requires_grad_(), delta.requires_grad_()
    (of_input,) = torch.autograd.grad(of(x, kind), x, delta, create_graph=True)
    return torch.autograd.grad(of_input, (x, delta), up)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values(device: str, kind: str, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        x, delta, up = 3 * torch.randn(3, *shape, dtype=dtype)
        got = ops.activation_derivative(*(t.to(device) for t in (x, delta, up)), kind)
        for one, two in zip(got, truth(x, delta, up, kind), strict=True):
            assert one.dtype == dtype
            assert_close(one, two, 1 + float(two.norm()))


@pytest.mark.parametrize("kind", KINDS)
def test_each_value_is_right_from_end_to_end(device: str, kind: str) -> None:
    """Both derivatives, to rounding of values about 1, and 0 where they are as good as that."""
    x = torch.cat([torch.linspace(-14, 14, 20001), torch.tensor([-3e4, -200.0, 200.0, 3e4])])
    one = torch.ones_like(x)
    got = ops.activation_derivative(*(t.to(device) for t in (x, one, one)), kind)
    for found, want in zip(got, truth(x, one, one, kind), strict=True):
        torch.testing.assert_close(found.double().cpu(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_comes_through(device: str, kind: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        for k in range(3):
            maps = [torch.rand(40) + 0.5 for _ in range(3)]
            maps[k][[3, 37]] = value
            found = ops.activation_derivative(*(t.to(device) for t in maps), kind)
            wrong = [t.isfinite().logical_not().nonzero().flatten().tolist() for t in found]
            assert wrong[1] in ([3, 37], []) if k != 1 else wrong == [[3, 37], []]
            assert value == value or wrong[0] == [3, 37]


def test_maps_that_lie_alike_are_not_copied(device: str) -> None:
    x, delta, up = torch.randn(3, 2, 6, 4, 5, device=device)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, delta, up)]
    found = ops.activation_derivative(*last, "gelu")
    assert [t.stride() for t in found] == [last[0].stride()] * 2
    torch.testing.assert_close(found, ops.activation_derivative(x, delta, up, "gelu"))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_order(kind: str) -> None:
    maps = [torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: recorded(*t, kind), maps)
    assert torch.autograd.gradgradcheck(lambda *t: recorded(*t, kind), maps)


def test_what_it_refuses() -> None:
    x = torch.randn(4)
    with pytest.raises(ValueError, match="kind"):
        ops.activation_derivative(x, x, x, "mish")
    with pytest.raises(ValueError, match="delta"):
        ops.activation_derivative(x, x[:3], x, "gelu")
    with pytest.raises(TypeError, match="up"):
        ops.activation_derivative(x, x, x.long(), "gelu")
