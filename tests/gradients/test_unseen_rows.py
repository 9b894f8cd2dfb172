"""Rows whose sample a probe cannot read, in a layout that no pattern completes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastdg
from fastdg.gradients import engine

BAGS = torch.tensor([2, 0, 1, 1, 2, 0, 2])  # the sample of each row


def rows_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    return layer(torch.randn(len(BAGS), 3, dtype=dtype)).index_select(0, torch.arange(len(BAGS)))


def losses_of(layer: nn.Linear, scale: tuple[float, ...]) -> Tensor:
    each = rows_of(layer, torch.float32).sin().sum(1)
    losses = torch.zeros(3, dtype=torch.float32).index_add(0, BAGS, each)
    return losses * torch.tensor(scale, dtype=torch.float32)


def compare(losses: Tensor, weight: Tensor) -> None:
    found = fastdg.per_sample_gradients(losses, params={"weight": weight})["weight"]
    for got, loss in zip(found, losses, strict=True):
        (grad,) = torch.autograd.grad(loss, [weight], retain_graph=True)
        size = grad.abs().max().nan_to_num()
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5 * float(size), equal_nan=True)


@pytest.mark.parametrize(
    "scale",
    [
        (1e-30, 1.0, 1e30),
        (1e-36, 1.0, 1e36),
        (1.0, 1e-40, 1.0),  # too small for any power of two
    ],
)
def test_samples_of_very_different_size(scale: tuple[float, ...]) -> None:
    layer = nn.Linear(3, 3).float()
    compare(losses_of(layer, scale), layer.weight)


@pytest.mark.parametrize(
    "scale",
    [(1.0, math.nan, 1.0), (1.0, 1.0, math.inf), (math.nan, math.nan, math.nan)],
)
def test_what_is_not_finite_stays_with_its_sample(scale: tuple[float, ...]) -> None:
    """Autograd alone would hand it to all, as 0 * NaN is NaN."""
    layer = nn.Linear(3, 3).float()
    torch.manual_seed(0)
    losses = losses_of(layer, scale)
    torch.manual_seed(0)
    finite = losses_of(layer, (1.0, 1.0, 1.0))
    found = fastdg.per_sample_gradients(losses, params={"weight": layer.weight})["weight"]
    for got, loss, factor in zip(found, finite, scale, strict=True):
        if math.isfinite(factor):
            (grad,) = torch.autograd.grad(loss, [layer.weight], retain_graph=True)
            torch.testing.assert_close(got, grad)
        else:
            assert not got.isfinite().any()


@pytest.mark.parametrize("seed", [8, 11, 27])
def test_rows_that_a_narrower_dtype_above_has_rounded(seed: int) -> None:
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(6, 5))
    rows = (torch.randn(40, 5) @ weight.t()).index_select(0, torch.randperm(40))
    scale = 10 ** torch.empty(20).uniform_(-30, 30).float()
    each = rows.float().sin().sum(1)
    losses = torch.zeros(20, dtype=torch.float32).index_add(0, torch.randint(20, (40,)), each)
    compare(losses * scale, weight)


def test_two_rows_of_which_one_cannot_be_read() -> None:
    layer = nn.Linear(3, 3).float()
    rows = layer(torch.randn(2, 3, dtype=torch.float32)).index_select(0, torch.tensor([1, 0]))
    compare(rows.sin().sum(1) * torch.tensor([1.0, 1e-40], dtype=torch.float32), layer.weight)


def test_a_plan_made_of_unreadable_rows_is_not_remembered() -> None:
    layer = nn.Linear(3, 3, bias=False).float()
    named = {"weight": layer.weight}
    plans = [
        engine.plan_gradients(losses_of(layer, (1.0, faint, 1.0)), named).plan
        for faint in (1e-40, 1.0)
    ]
    assert [bool(plan.slow) for plan in plans] == [True, False]
    assert plans[0].silent


@pytest.mark.parametrize("features", [4, 300])  # few enough to be looked at one by one, or not
@pytest.mark.parametrize("large", [1.0, 1e8])
def test_a_large_gradient_does_not_hide_a_small_one_in_the_same_row(
    features: int, large: float
) -> None:
    weight = nn.Parameter(torch.randn(features, 5, dtype=torch.float32))
    columns = (weight @ torch.randn(5, 300, dtype=torch.float32)).sin()
    columns = columns.index_select(1, torch.randperm(300))
    of_column = torch.randint(10, (300,))
    scale = torch.ones(10, dtype=torch.float32)
    scale[3] = large
    losses = torch.zeros(10, dtype=torch.float32).index_add(0, of_column, columns.sum(0)) * scale
    compare(losses, weight)
    assert not engine.plan_gradients(losses, {"weight": weight}).plan.slow


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
