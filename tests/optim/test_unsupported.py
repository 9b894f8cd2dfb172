"""Ways to train that are refused in words, and their neighbours that are not."""

from __future__ import annotations

import copy

import pytest
import torch
from bases import WRAPS, batch, network, steps, wrap
from torch import nn
from torch.optim import SGD, Adam


def test_maximize() -> None:
    model, more = network(), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^base: .*maximize=True"):
        wrap(SGD(model.parameters(), lr=0.1, maximize=True))
    opt = wrap(SGD(model.parameters(), lr=0.1))
    opt.add_param_group({"params": [more], "maximize": True})
    losses, domains = batch(model)
    with pytest.raises(ValueError, match=r"^base: .*maximize=True"):
        opt.backward(losses, domains)


@pytest.mark.parametrize("gradients", ["real", "zero"])
@pytest.mark.parametrize("used", [False, True])
def test_step_without_backward_at_learning_rate_zero(gradients: str, used: bool) -> None:
    """A warm-up from 0 hides a missing backward; only what checkpoint libraries do is let by."""
    model = network()
    opt = wrap(Adam(model.parameters()))
    if used:
        steps(model, opt, range(1))
        opt.zero_grad()
    opt.param_groups[0]["lr"] = 0.0
    batch(model)[0].mean().backward()
    if gradients == "zero":
        for p in model.parameters():
            p.grad.zero_()
    if gradients == "zero" and not used:
        opt.step()
        return
    with pytest.raises(RuntimeError, match="needs a backward"):
        opt.step()


@pytest.mark.parametrize("name", ["PCGrad", "AgrSum", "ANDMask", "Fish"])
def test_surgery_goes_around_an_optimizer_that_maximises(name: str) -> None:
    """The step is the other way, and there is no penalty to be maximised."""
    model = network()
    twin = copy.deepcopy(model)
    up, down = SGD(model.parameters(), lr=0.1, maximize=True), SGD(twin.parameters(), lr=0.1)
    start = [p.detach().clone() for p in model.parameters()]
    for net, base in ((model, up), (twin, down)):
        torch.manual_seed(1)
        steps(net, WRAPS[name](base), [0])
    for p, q, origin in zip(model.parameters(), twin.parameters(), start, strict=True):
        torch.testing.assert_close(p - origin, origin - q)
