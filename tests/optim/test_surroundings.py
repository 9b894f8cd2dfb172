"""What may stand around `backward`: grad modes, hooks that step, parameters of two dtypes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import network
from torch import Tensor, nn
from torch.optim import SGD

import fastdg

ALONE = ["ERM", "Fishr", "VREx", "GroupDRO", "AgrSum", "PCGrad", "IGA", "IRM"]
ALL = {"Fishr": {"params": "all", "anneal_steps": 0}, "IRM": {"anneal_steps": 0}}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(12, 4).double(), torch.randint(3, (12,)), torch.arange(12) % 3


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def alone(name: str, model: nn.Module) -> Any:
    return getattr(fastdg, name)(SGD(model.parameters(), lr=1e-4), **ALL.get(name, {}))


@pytest.mark.parametrize("name", ALONE)
def test_it_may_be_called_under_no_grad(name: str) -> None:
    model = network(torch.float64)
    twin = copy.deepcopy(model)
    x, y, d = batch()
    torch.manual_seed(0)  # PCGrad's order
    alone(name, model).backward(losses(model, x, y), d)
    value = losses(twin, x, y)
    torch.manual_seed(0)
    with torch.no_grad():
        alone(name, twin).backward(value, d)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("name", ["Fishr", "IGA"])
def test_some_parameters_may_be_float64(name: str) -> None:
    trunk, head = nn.Linear(4, 5), nn.Linear(5, 3).double()
    model = nn.ModuleList([trunk, head])
    twin = copy.deepcopy(model).double()
    opt, expected = alone(name, model), alone(name, twin)
    x, y, d = batch()
    for _ in range(2):
        for o, m in ((opt, model), (expected, twin)):
            o.zero_grad()
            h = m[0](x.to(m[0].weight.dtype)).tanh().double()
            o.backward(F.cross_entropy(m[1](h), y, reduction="none"), d)
            o.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALONE)
def test_hooks_may_use_and_clear_the_gradient(name: str) -> None:
    """As an optimizer that steps in the backward does, parameter by parameter."""
    model = network(torch.float64)
    twin = copy.deepcopy(model)
    x, y, d = batch()
    torch.manual_seed(0)
    alone(name, twin).backward(losses(twin, x, y), d)
    used: dict[Tensor, Tensor] = {}

    def use(p: Tensor) -> None:
        used[p], p.grad = p.grad, None  # type: ignore[assignment]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(use)
    torch.manual_seed(0)
    alone(name, model).backward(losses(model, x, y), d)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(used[p], q.grad)


class Twice(torch.autograd.Function):
    """What a hook does that doubles a gradient, as gradient reversal turns it around."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


def doubled(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: 2 * grad)
    return x


@pytest.mark.parametrize("weight", [0.0, 5.0])
@pytest.mark.parametrize(
    ("name", "trained"), [("Fishr", 2), ("Fishr", 1), ("Fishr", 0), ("AgrSum", 1), ("AgrSum", 0)]
)
def test_hooks_of_activations(name: str, trained: int, weight: float) -> None:
    """Of layers that are looked at, above others that are looked at, too, or are not."""
    model = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)]).double()
    x, y, d = batch()
    found = []
    for twice in (doubled, Twice.apply):
        twin = copy.deepcopy(model)
        looked_at = list(twin[trained:].parameters() if trained < 2 else twin[1:].parameters())
        if name == "Fishr":
            sgd = SGD(twin.parameters(), lr=0.1)
            opt: Any = fastdg.Fishr(sgd, params=looked_at, penalty_weight=weight, anneal_steps=0)
            if trained == 2:
                opt = fastdg.Fishr(sgd, penalty_weight=weight, anneal_steps=0)
        else:
            opt = fastdg.AgrSum(SGD(looked_at, lr=0.1))
        h = twice(twin[1](twice(twin[0](x)).tanh()))
        opt.backward(F.cross_entropy(h, y, reduction="none"), d)
        found.append([p.grad for p in twin.parameters()])
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q)


class Gained(torch.autograd.Function):
    """A product that no rule knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, gain = ctx.saved_tensors
        return grad * gain, (grad * x).sum(0)


@pytest.mark.filterwarnings("ignore:params")
@pytest.mark.parametrize("name", ["ERM", "Fishr", "AgrSum", "PCGrad", "IGA"])
def test_hooks_of_parameters_wait_for_the_result(name: str) -> None:
    """Also of a parameter that others are made from, or below batch norm, or of no rule's."""
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(4, 5)), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    model.register_parameter("gain", nn.Parameter(torch.ones(5)))
    model.double()
    x, y, d = batch()
    calls: dict[int, int] = {}

    def clip(k: int, grad: Tensor) -> Tensor:
        calls[k] = calls.get(k, 0) + 1
        return grad.clamp(-0.01, 0.01)

    found = []
    for hooked in (False, True):
        twin = copy.deepcopy(model)
        for k, p in enumerate(twin.parameters()):
            if hooked:
                p.register_hook(partial(clip, k))
        torch.manual_seed(0)
        h = twin[2](twin[1](twin[0](x)))
        value = F.cross_entropy(twin[3](Gained.apply(h, twin.gain)), y, reduction="none")
        alone(name, twin).backward(value, d)
        found.append([p.grad for p in twin.parameters()])
    assert calls == dict.fromkeys(range(len(found[0])), 1)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p.clamp(-0.01, 0.01), q)
