"""A step that raises leaves weights, gradients and all state as they were: the next try is as the
first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import EVERY, batch, network, same, seeded
from torch import nn
from torch.amp import GradScaler
from torch.optim import Adam
from torch.utils import _pytree as pytree

import fastdg
from fastdg.core.annealed import Annealed
from fastdg.core.nesting import chain


class Fails(Adam):
    """An Adam whose next step fails, if ``fails``."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise OSError("the step failed")
        return super().step(closure)


def fails(base: Fails, step: Callable[[], object]) -> None:
    base.fails = True
    with pytest.raises(OSError, match="the step failed"):
        step()
    base.fails = False


def everything(model: nn.Module, opt: Any) -> list[Any]:
    """Weights, buffers, gradients and state, without what an iteration is about to begin with."""
    state = copy.deepcopy(opt.state_dict())
    if state["param_groups"][0].get(f"{opt.prefix}_position") == 0:
        for entry in state["state"].values():
            entry.pop(f"{opt.prefix}_kept", None)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return pytree.tree_leaves((copy.deepcopy(model.state_dict()), grads, state))


def equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def made(wrapper: str, **more: Any) -> tuple[nn.Module, Fails, Any]:
    model = network()
    base = Fails(model.parameters(), lr=1e-2)
    return model, base, EVERY[wrapper](base, **more)


@pytest.mark.parametrize("wrapper", EVERY)
def test_every_wrapper(wrapper: str) -> None:
    torch.manual_seed(0)
    model, base, opt = made(wrapper)
    twin, other = copy.deepcopy((model, opt))
    for seed in range(7):
        for m, o in ((model, opt), (twin, other)):
            o.zero_grad()
            torch.manual_seed(seed)
            o.backward(*batch(m, seed))
        before = everything(model, opt)
        for _ in range(2):
            fails(base, opt.step)
            # The optimizer's moments of before an anneal are dropped in each try alike
            anneals = [x for x in chain(opt) if isinstance(x, Annealed) and x.steps]
            if all(x.steps != x.anneal_steps for x in anneals):
                assert equal(everything(model, opt), before), seed
        opt.step()
        other.step()
        same(model, twin)
    assert equal(everything(model, opt), everything(twin, other))


def test_the_gain_of_a_failed_inner_step_is_counted_once() -> None:
    found = []
    for tries in (0, 1):
        torch.manual_seed(0)
        model = network()
        base = Fails(model.parameters(), lr=1e-2)
        opt = fastdg.Fish(base, num_domains=3, inner_product=True)
        for d in range(3):
            losses, domains = batch(model, d)
            opt.zero_grad()
            opt.backward(losses, domains * 0 + d)
            for _ in range(tries):
                fails(base, opt.step)
            opt.step()
        found.append(opt.statistics["inner_product"])
    assert torch.equal(*found)


def test_a_search_that_failed_leaves_the_weights() -> None:
    """Its candidates move them before the optimizer steps."""
    torch.manual_seed(0)
    model = network()
    base = Fails(model.parameters(), lr=1e-2)
    opt = fastdg.GGA(
        base, start=0, size=0.1, tolerance=10.0, candidates=5, generator=seeded(), num_domains=3
    )
    twin, other = copy.deepcopy((model, opt))
    before = copy.deepcopy(model.state_dict())
    fails(base, lambda: opt.step(lambda: batch(model)))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert opt.step(lambda: batch(model)) == other.step(lambda: batch(twin))
    assert opt.statistics["accepted"] > 0
    same(model, twin)


@pytest.mark.parametrize("early", [False, True], ids=["in step", "unscale_"])
@pytest.mark.parametrize("wrapper", ["ERM", "GENIE", "POGM", "SWAD(Fishr)"])
def test_with_a_scaler(wrapper: str, early: bool) -> None:
    torch.manual_seed(0)
    model, base, opt = made(wrapper)
    twin, other = copy.deepcopy((model, opt))
    scaler, scaler2 = GradScaler("cpu"), GradScaler("cpu")
    for seed in range(4):
        for m, o, s in ((model, opt, scaler), (twin, other, scaler2)):
            o.zero_grad()
            o.backward(*batch(m, seed), scaler=s)
            if early:
                s.unscale_(o)
        fails(base, lambda: scaler.step(opt))
        scaler.step(opt)
        scaler2.step(other)
        scaler.update()
        scaler2.update()
        same(model, twin)
