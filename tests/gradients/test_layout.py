"""Rows brought to their samples, and the gradient of that."""

from __future__ import annotations

import torch

from fastdg.gradients.ownership.layout import Layout


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
