"""A ``torch.amp.GradScaler`` used in the wrong way is told so, and nothing moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bases import BASES, Wrap, batch, network, same
from on_device import DEVICE
from scalers import WRAPPERS, alike, flat, start, train
from torch.amp import GradScaler


@pytest.fixture(params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest) -> Wrap:
    return WRAPPERS[request.param]


def ready(name: str = "Fishr", scaler: GradScaler | None = None) -> Any:
    model, opt = start(WRAPPERS[name])
    opt.backward(*batch(model), scaler=scaler)
    return model, opt


@pytest.fixture
def scaler() -> GradScaler:
    return GradScaler(DEVICE, init_scale=1024.0)


@pytest.mark.parametrize("name", ["Fishr", "MIRO", "SWAD(Fishr)", "Fish"])
@pytest.mark.parametrize("unscale", [False, True])
def test_backward_that_was_not_given_the_scaler(
    name: str, unscale: bool, scaler: GradScaler
) -> None:
    for losses_too in (False, True):
        model, opt = start(WRAPPERS[name])
        before = copy.deepcopy(model.state_dict())
        losses, domains = batch(model)
        scaled = scaler.scale(losses)
        opt.backward(scaled if losses_too else losses, domains)
        if unscale:
            scaler.unscale_(opt)
        with pytest.raises(RuntimeError, match=r"opt.backward\(losses, domains, scaler=scaler\)"):
            scaler.step(opt)
        alike(before, model.state_dict())
        scaler.update()
        train(model, opt, range(2))  # and it goes on without


def test_step_without_the_scaler(wrapper: Wrap, scaler: GradScaler) -> None:
    model, opt = start(wrapper)
    opt.backward(*batch(model), scaler=scaler)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"\.step\(\): .*scaler\.step"):
        opt.step()
    alike(before, model.state_dict())
    scaler.step(opt)  # for which it is not too late
    assert not torch.equal(flat(before.values()), flat(model.parameters()))


@pytest.mark.parametrize("name", ["Fishr", "AgrSum(MIRO)", "SWAD(Fishr)"])
def test_unscaled_inside(name: str, scaler: GradScaler) -> None:
    _, opt = ready(name, scaler)
    inner = opt.base.base if "(" in name else opt.base
    scaler.unscale_(inner)
    with pytest.raises(RuntimeError, match=r"^scaler: unscale_ .*Adam"):
        scaler.step(opt)


def test_the_scaler_of_someone_else(scaler: GradScaler) -> None:
    other = GradScaler(DEVICE, init_scale=2.0)
    other.scale(torch.ones(()))
    _, opt = ready(scaler=scaler)
    with pytest.raises(RuntimeError, match=r"^scaler: scaler\.step"):
        other.step(opt)
    with pytest.raises(TypeError, match=r"^scaler: .*got int"):
        ready(scaler=1024)  # type: ignore[arg-type]


def test_losses_that_are_scaled_already(scaler: GradScaler) -> None:
    model, opt = start(WRAPPERS["Fishr"])
    losses, domains = batch(model)
    with pytest.raises(ValueError, match=r"^losses: .*scaler\.scale"):
        opt.backward(scaler.scale(losses), domains, scaler=scaler)
    train(model, opt, range(1), scaler)


@pytest.mark.parametrize("name", ["Fishr", "PCGrad", "SWAD(Fishr)"])
@pytest.mark.parametrize("final", [False, True])
def test_one_step_of_scaled_and_other_gradients(name: str, final: bool, scaler: GradScaler) -> None:
    for first, second in ((scaler, None), (None, scaler), (GradScaler(DEVICE), scaler)):
        model, opt = start(WRAPPERS[name])
        opt.backward(*batch(model, 0), final=final, scaler=first)
        with pytest.raises(RuntimeError, match=r"^scaler: "):
            opt.backward(*batch(model, 1), scaler=second)
        opt.zero_grad()
        opt.backward(*batch(model, 1), scaler=second)


@pytest.mark.parametrize("name", ["Fishr", "AgrSum(MIRO)", "SWAD(Fishr)"])
def test_backward_after_unscale(name: str, scaler: GradScaler) -> None:
    model, opt = ready(name, scaler=scaler)
    opt.backward(*batch(model, 1), scaler=scaler)  # gradients add up
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"^scaler: scaler\.unscale_"):
        opt.backward(*batch(model, 2), scaler=scaler)
    scaler.step(opt)


def test_step_of_the_scaler_without_backward(scaler: GradScaler) -> None:
    model, opt = start(WRAPPERS["Fishr"])
    scaler.scale(batch(model)[0].mean()).backward()
    with pytest.raises(RuntimeError, match="needs a backward"):
        scaler.step(opt)
    opt.zero_grad()
    opt.backward(*batch(model), final=False, scaler=scaler)
    with pytest.raises(RuntimeError, match="needs a final backward"):
        opt.step()


def test_closures(scaler: GradScaler) -> None:
    model, opt = ready(scaler=scaler)
    with pytest.raises(RuntimeError, match=r"^closure: .*GradScaler"):
        scaler.step(opt, lambda: batch(model, 1))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(opt, closure=lambda: batch(model, 1))
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"^Fishr\.step\(\): .*scaler"):
        opt.step(lambda: (*batch(model, 1), {"scaler": scaler}))


def test_a_scaler_that_is_off(wrapper: Wrap) -> None:
    model, opt = start(wrapper)
    model2, opt2 = start(wrapper)
    train(model, opt, range(2))
    train(model2, opt2, range(2), GradScaler(DEVICE, enabled=False))
    same(model, model2)


def test_copies_know_no_scaler(scaler: GradScaler) -> None:
    model, opt = ready(scaler=scaler)
    model2, opt2 = copy.deepcopy((model, opt))
    train(model2, opt2, range(1))
    scaler.step(opt)


def test_gradients_in_half_precision(scaler: GradScaler) -> None:
    """As torch has it: the scaler unscales none in float16."""
    model = network(torch.float16)
    opt = WRAPPERS["VREx"](BASES["momentum"](model.parameters()))
    opt.backward(*batch(model), scaler=scaler)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(opt)
