"""Ways to train that are refused in words, and their neighbours that are not."""

from __future__ import annotations

import copy

import pytest
import torch
from bases import Make, batch, network, same, steps, wrap
from torch import nn
from torch.optim import SGD, Adam


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(make: Make, unscale: bool) -> None:
    model = network()
    opt = wrap(make(model.parameters()))
    before = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu")
    losses, domains = batch(model)
    opt.backward(scaler.scale(losses), domains)
    if unscale:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"GradScaler is not supported yet: bf16 .* needs none"):
        scaler.step(opt)
    same(model, before)
    assert opt.steps == 0
    steps(model, opt, range(2))  # and without it, all is well
    assert opt.steps == 2


def test_grad_scaler_that_is_off() -> None:
    model = network()
    opt = wrap(Adam(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses, domains = batch(model)
    opt.backward(scaler.scale(losses), domains)
    scaler.step(opt)
    scaler.update()
    assert opt.steps == 1


def test_maximize() -> None:
    model, more = network(), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="maximize=True, so that Fishr would maximise the penalty"):
        wrap(SGD(model.parameters(), lr=0.1, maximize=True))
    opt = wrap(SGD(model.parameters(), lr=0.1))
    opt.add_param_group({"params": [more], "maximize": True})
    losses, domains = batch(model)
    with pytest.raises(ValueError, match="maximize=True"):
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
    with pytest.raises(RuntimeError, match="needs a backward before it"):
        opt.step()
