"""Gradients through an activation's own backward: autograd's, in one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOMAINS
from penalties import gradients_of, penalty_of, per_sample, third
from torch import Tensor, nn
from torch.nn import functional as F

from fastdg.gradients.graph import Graph, output_shapes

N = len(DOMAINS)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "silu, in place": lambda: nn.SiLU(inplace=True),
}


def made(name: str, dtype: torch.dtype = torch.float64, last: bool = False) -> Any:
    torch.manual_seed(4)
    one, two = ACTIVATIONS[name](), ACTIVATIONS[name]()
    layers = [nn.Conv2d(2, 4, 2), one, nn.Conv2d(4, 4, 2), two, nn.Flatten(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).to(dtype)
    if last:
        model = model.to(memory_format=torch.channels_last)
    return model, torch.randn(N, 2, 4, 4, dtype=dtype).requires_grad_()


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(N) % 3, reduction="none")


def gradients(model: nn.Module, x: Tensor, params: Any = None) -> list[Tensor]:
    loss = penalty_of(losses_of(model, x), params or model)
    return gradients_of(loss, [*model.parameters(), x])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("params", ["all", "first"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_same_as_autograd(name: str, params: str, last: bool, autograd: Any) -> None:
    model, x = made(name, last=last)
    tracked = None if params == "all" else {"first": model[0].weight}
    wanted = autograd(lambda: gradients(model, x, tracked))
    torch.testing.assert_close(gradients(model, x, tracked), wanted)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    model, x = made(name, dtype)
    found = gradients(model, x)
    exact = gradients(model.double(), x.detach().double().requires_grad_())
    assert {g.dtype for g in found} == {dtype}
    for one, two in zip(found, exact, strict=True):
        assert (one - two).norm() <= (0.1 if dtype == torch.bfloat16 else 1e-4) * two.norm() + 1e-3


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_product_of_the_size_of_the_input(name: str) -> None:
    model, x = made(name)
    root = penalty_of(losses_of(model, x), model).grad_fn
    assert root is not None
    maps = {(N, 4, 3, 3), (N, 4, 2, 2)}
    names = [n.name() for n in Graph(root).nodes if maps & set(output_shapes(n))]
    assert not [n for n in names if n.startswith(("Mul", "GeluBackwardBackward", "Sigmoid"))]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_every_order(name: str) -> None:
    model, x = made(name)
    leaves = list(model.parameters())[:-1]
    rows = [
        torch.autograd.grad(r, model[0].bias, create_graph=True)[0] for r in losses_of(model, x)
    ]
    found = third(per_sample(losses_of(model, x), model[0].bias), leaves, x)
    torch.testing.assert_close(found, third(torch.stack(rows), leaves, x))
