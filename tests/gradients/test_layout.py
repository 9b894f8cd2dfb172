"""Rows brought to their samples, and the gradient of that."""

from __future__ import annotations

import pytest
import torch

from fastdg.gradients.ownership.layout import Layout
from fastdg.gradients.rules.convolution import _rows


def test_gradient_of_rows_is_no_view() -> None:
    """Autograd adds to it in place, and does not take new memory for the sum."""
    x = torch.randn(6, 4, requires_grad=True)
    given: list[torch.Tensor] = []
    shifted = x + 0
    shifted.register_hook(given.append)
    rows = Layout.of(torch.arange(6) // 2, 3).rows(shifted)
    assert rows.shape == (3, 2, 4)
    (rows * torch.arange(24.0).view(3, 2, 4)).sum().backward()
    assert given[0]._base is None
    assert torch.equal(x.grad, torch.arange(24.0).view(6, 4))


def test_rows_have_every_derivative() -> None:
    layout = Layout.of(torch.arange(6) // 2, 3)
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layout.rows(x).pow(3).sum(), x)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_a_convolution_s_delta_lies_as_it_does(order: torch.memory_format) -> None:
    """Else every operation that meets another map takes many times as long."""
    delta = torch.randn(3, 4, 5, 6).contiguous(memory_format=order).requires_grad_()
    rows = _rows(delta)
    assert torch.equal(rows, delta.flatten(2).mT)
    up = torch.randn(3, 30, 4)
    (found,) = torch.autograd.grad(rows, delta, up)
    assert torch.equal(found, up.mT.unflatten(2, (5, 6)))
    assert found.stride() == delta.stride()
