"""Gradients through ReLU and hardsigmoid: autograd's, of their formulas where it has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import DOMAINS
from penalties import gradients_of, penalty_of, per_sample, third
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

N = len(DOMAINS)
KINDS = ["plain", "in place", "channels last"]


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(3)
    relu = lambda: nn.ReLU(inplace=kind == "in place")  # noqa: E731
    layers = [
        nn.Conv2d(2, 4, 2),
        relu(),
        nn.Conv2d(4, 4, 2),
        relu(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ]
    model = nn.Sequential(*layers).to(dtype)
    if kind == "channels last":
        model = model.to(memory_format=torch.channels_last)
    return model, torch.randn(N, 2, 4, 4, dtype=dtype).requires_grad_()


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(N) % 3, reduction="none")


def gradients(model: nn.Module, x: Tensor, params: Any) -> list[Tensor]:
    return gradients_of(penalty_of(losses_of(model, x), params), [*model.parameters(), x])


@pytest.mark.parametrize("params", ["all", "first"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_autograd(kind: str, params: str, autograd: Any) -> None:
    model, x = made(kind)
    tracked = model if params == "all" else {"first": model[0].weight}
    wanted = autograd(lambda: gradients(model, x, tracked))
    torch.testing.assert_close(gradients(model, x, tracked), wanted)


class Zeros(TorchDispatchMode):
    """Counts the maps of zeros that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "zero" in func.__name__ and out.dim() == 4 and len(out) == N:
            self.found += 1
        return out


def test_no_map_of_zeros(autograd: Any) -> None:
    model, x = made("plain")

    def zeros() -> int:
        loss = penalty_of(losses_of(model, x), model)
        with Zeros() as seen:
            loss.backward()
        return seen.found

    assert zeros() == 0
    assert autograd(zeros) >= 2


def test_derivatives_of_every_order() -> None:
    model, x = made("plain")
    leaves = list(model.parameters())[:-1]
    rows = [
        torch.autograd.grad(r, model[0].bias, create_graph=True)[0] for r in losses_of(model, x)
    ]
    found = third(per_sample(losses_of(model, x), model[0].bias), leaves, x)
    torch.testing.assert_close(found, third(torch.stack(rows), leaves, x))


class Hardsigmoid(nn.Module):
    """By its formula, which autograd differentiates, or torch's."""

    def __init__(self, formula: bool) -> None:
        super().__init__()
        self.first, self.last, self.formula = nn.Linear(3, 5), nn.Linear(5, 3), formula

    def forward(self, x: Tensor) -> Tensor:
        z = 6 * self.first(x)  # about half of them inside (-3, 3)
        z = (z / 6 + 0.5).clamp(0, 1) if self.formula else F.hardsigmoid(z)
        return self.last(z.tanh())


@pytest.mark.parametrize("params", ["all", "first"])
def test_hardsigmoid(params: str) -> None:
    found = []
    for formula in (True, False):
        torch.manual_seed(4)
        model = Hardsigmoid(formula).double()
        x = torch.randn(N, 3, dtype=torch.double).requires_grad_()
        found.append(gradients(model, x, model if params == "all" else {"": model.first.weight}))
    torch.testing.assert_close(*found)
