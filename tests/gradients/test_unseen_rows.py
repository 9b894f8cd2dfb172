"""Rows whose sample a probe cannot read, in a layout that no pattern completes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastdg

BAGS = torch.tensor([2, 0, 1, 1, 2, 0, 2])  # the sample of each row


def rows_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    return layer(torch.randn(len(BAGS), 3, dtype=dtype)).index_select(0, torch.arange(len(BAGS)))


@pytest.mark.xfail(
    reason="float32 holds 1e-30 and 1e30, but not both scaled by one power of two that keeps the "
    "larger finite: rows of the faint sample read as zero and belong to nobody"
)
def test_samples_of_very_different_size() -> None:
    layer = nn.Linear(3, 3).float()
    scale = torch.tensor([1e-30, 1.0, 1e30], dtype=torch.float32)
    each = rows_of(layer, torch.float32).sin().sum(1)
    losses = torch.zeros(3, dtype=torch.float32).index_add(0, BAGS, each) * scale
    found = fastdg.per_sample_gradients(losses, params=layer)["weight"]
    for i in range(3):
        (grad,) = torch.autograd.grad(losses[i], [layer.weight], retain_graph=True)
        torch.testing.assert_close(found[i], grad, rtol=1e-4, atol=0.0)


@pytest.mark.xfail(
    reason="a row whose gradient is zero by value belongs to nobody, and its second derivative is "
    "lost; only a gradient that is zero everywhere is planned again for create_graph"
)
def test_a_row_that_is_zero_by_value_has_a_second_derivative() -> None:
    layer = nn.Linear(3, 3, bias=False)
    gate = nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    each = rows_of(layer, torch.float64).sin().sum(1) * gate
    losses = torch.zeros(3).index_add(0, BAGS, each)
    domains = torch.zeros(3, dtype=torch.int64)
    named = {"weight": layer.weight}
    moments = fastdg.domain_moments(losses, domains, params=named, create_graph=True)
    (got,) = torch.autograd.grad(moments.variance["weight"].sum(), [gate], retain_graph=True)
    rows = torch.stack(
        [torch.autograd.grad(v, [layer.weight], create_graph=True)[0] for v in losses]
    )
    (expected,) = torch.autograd.grad(rows.var(0, unbiased=False).sum(), [gate])
    torch.testing.assert_close(got, expected)
