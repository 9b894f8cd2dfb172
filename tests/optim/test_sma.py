"""SMA against means over all the weights and running statistics that there were, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import through_a_file, wrap
from definitions import MAKES, alike, batches, close, losses_of, net
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adam

import fastdg
from fastdg.averaging.buffers import Buffers


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and floating buffers."""
    return {k: x.clone() for k, x in model.state_dict().items() if x.is_floating_point()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-14) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, tolerance)


def train(opt: Any, model: nn.Module, data: Any) -> list[dict[str, Tensor]]:
    """What there was after each step."""
    seen = []
    for x, y, domains in data:
        opt.zero_grad()
        opt.backward(losses_of(model, x, y), domains)
        opt.step()
        seen.append(tensors(model))
    return seen


@pytest.mark.parametrize("start", [1, 2, 4, 50])
@pytest.mark.parametrize("inner", ["plain", "Fishr"])
def test_the_mean_of_all_steps_from_one_on(inner: str, start: int) -> None:
    model, data = net(batch_norm=True), batches(7)
    base = MAKES["adam"](model)
    twin = copy.deepcopy(model)
    alone = wrap(MAKES["adam"](twin)) if inner == "Fishr" else fastdg.ERM(MAKES["adam"](twin))
    opt = fastdg.SMA(wrap(base) if inner == "Fishr" else base, model, start=start)
    seen = train(opt, model, data)
    train(alone, twin, data)
    alike(model, twin, 0)  # training goes on as without it
    joined = seen[max(start - 2, 0) :] or seen[-1:]
    expected = {k: torch.stack([x[k] for x in joined]).mean(0) for k in seen[0]}
    own = tensors(model)
    with opt.applied() as shown:
        assert shown is model
        same(tensors(model), expected)
        with pytest.raises(RuntimeError, match=r"^SMA\.step: .* inside `applied`"):
            opt.step()
    same(tensors(model), own, 0)
    copied = opt.averaged()
    assert int(copied.n_averaged) == len(joined)
    same(tensors(copied.module), expected)
    opt.apply()
    same(tensors(model), expected)


def test_what_the_authors_code_gave() -> None:
    """``MovingAvg`` of salesforce/ensemble-of-averages at 19183f1, with sma_start_iter = 3."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.25, -2.0]], dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, -0.25], [1.0, 0.75]]))
        model[0].bias.copy_(torch.tensor([0.125, -0.5]))
    opt = fastdg.SMA(Adam(model.parameters(), lr=0.1), model, start=3)
    for step in range(6):
        opt.zero_grad()
        F.cross_entropy(model(x * (1 + step)), torch.tensor([0, 1, 1])).backward()
        opt.step()
        if step + 1 in GAVE:
            with opt.applied():
                found = torch.cat([v.flatten() for v in tensors(model).values()])
            close(found, torch.tensor(GAVE[step + 1], dtype=torch.float64), 1e-9)


GAVE = {
    2: [
        *(0.6941015208895877, -0.049887325308612895, 1.20013308593292, 0.550619716086659),
        *(0.12499999985391802, -0.5000000003579008, 0.849109291834085, 0.8005707228726334),
        *(-0.19902845270629915, 0.19902845270629915, 0.028749999960569386, -0.0362499998420272),
        *(0.9944062496421602, 2.631531266649818),
    ],
    6: [
        *(0.8211865569550836, 0.13035820919418334, 1.3910350528580153, 0.35070943636406804),
        *(0.1249999997640691, -0.5000000004804395, 0.9411551036878407, 0.6071860364806191),
        *(-0.3640097792954884, 0.36400977929548833, 0.10289328635510961, 0.012236866236285813),
        *(3.375780371496353, 11.803066666729762),
    ],
}


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_goes_on_bit_for_bit(steps: int) -> None:
    data = batches(8)

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(2)
        model = net(batch_norm=True)
        return model, fastdg.SMA(wrap(MAKES["adam"](model)), model, start=3)

    model, opt = made()
    train(opt, model, data[:steps])
    again, other = through_a_file(made, model, opt)
    for m, o in ((model, opt), (again, other)):
        train(o, m, data[steps:])
        o.apply()
    same(tensors(model), tensors(again), 0)


def test_half_precision_is_averaged_in_float32() -> None:
    model = nn.Linear(3, 2).bfloat16()
    opt = fastdg.SMA(SGD(model.parameters(), lr=0.1), model, start=1)
    seen = []
    for _ in range(5):
        opt.zero_grad()
        opt.backward(model(torch.randn(4, 3).bfloat16()).square().sum(1), 0)
        opt.step()
        seen.append(model.weight.detach().double())
    close(opt.average[model.weight].double(), torch.stack(seen).mean(0), 1e-6)


def test_buffers_without_values_stay() -> None:
    model = net(batch_norm=True)
    model.register_buffer("far", torch.zeros(3, device="meta"))
    opt = fastdg.SMA(MAKES["adam"](model), model, start=1)
    seen = [x["norm.running_mean"] for x in train(opt, model, batches(3))]
    with opt.applied():
        close(model.norm.running_mean, torch.stack(seen).mean(0))
    assert model.far.is_meta


def _swapped(model: Any) -> None:
    model.scale, model.table = torch.zeros(2, 3), torch.zeros(4)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "another": (lambda model: model.register_buffer("more", torch.zeros(2)), "2 buffers.* got 3"),
    "smaller": (lambda model: setattr(model, "scale", torch.zeros(1)), r"\[4\].* got \[1\]"),
    "gone": (lambda model: delattr(model, "scale"), "2 buffers.* got 1"),
    "turned": (lambda model: setattr(model, "table", torch.zeros(3, 2)), r"2, 3\].* got \[3, 2\]"),
    "swapped": (_swapped, r"\[4\].* got \[2, 3\]"),  # as many numbers in all
}


def with_buffers() -> nn.Linear:
    model = nn.Linear(3, 2)
    model.register_buffer("scale", torch.ones(4))
    model.register_buffer("table", torch.ones(2, 3))
    return model


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("when", ["step", "applied"])
@pytest.mark.parametrize("change", CHANGES)
def test_buffers_that_change_are_refused(change: str, when: str, loaded: bool) -> None:
    changed, message = CHANGES[change]
    model = with_buffers()
    opt = fastdg.SMA(SGD(model.parameters(), lr=0.1), model, start=1)

    def step() -> None:
        opt.backward(model(torch.randn(4, 3)).square().sum(1), 0)
        opt.step()

    step()
    step()
    if loaded:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    changed(model)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"^model: expected .*{message}"):
        step() if when == "step" else opt.apply()
    assert opt.averaged_steps == opt.steps == 2
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("wrapper", ["none", "ERM", "SAM"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_closure_whose_forward_changes_them_makes_no_step(change: str, wrapper: str) -> None:
    changed, message = CHANGES[change]
    model = with_buffers()
    base = SGD(model.parameters(), lr=0.1)
    inner = base if wrapper == "none" else getattr(fastdg, wrapper)(base)
    opt = fastdg.SMA(inner, model, start=1)
    x = torch.randn(4, 3)

    def closure() -> tuple[torch.Tensor, int]:
        if opt.steps == 2:
            changed(model)
        return model(x).square().sum(1), 0

    for _ in range(2):
        opt.step(closure)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"^model: expected .*{message}"):
        opt.step(closure)
    assert opt.averaged_steps == opt.steps == 2
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "another"])
def test_buffers_of_a_meta_iteration_too(change: str) -> None:
    changed, message = CHANGES[change]
    model = with_buffers()
    opt = fastdg.Fish(SGD(model.parameters(), lr=0.1), num_domains=2, model=model)
    opt.backward(model(torch.randn(4, 3)).square().sum(1), 0)
    opt.step()
    changed(model)
    opt.backward(model(torch.randn(4, 3)).square().sum(1), 1)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"^model: expected .*{message}"):
        opt.step()
    assert opt.position == opt.steps == 1
    assert torch.equal(model.weight, before)


def test_buffers_on_two_devices() -> None:
    """On tensors without memory: there need be no second device."""
    with FakeTensorMode():
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(5, device="cuda"))
        now = Buffers(model).now()
    assert {kind: (len(x), x.device.type) for kind, x in now.items()} == {
        "buffers": (16, "cuda"),
        "counters": (2, "cuda"),
    }


def test_a_state_without_its_averages_is_refused() -> None:
    model = net()
    opt = fastdg.SMA(MAKES["adam"](model), model, start=1)
    train(opt, model, batches(2))
    state = opt.state_dict()
    for entry in state["state"].values():
        entry.pop("sma_average")
    with pytest.raises(ValueError, match=r"SMA run of 2 steps but has no sma_average"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_arguments(value: Any) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"^start: .*got "):
        fastdg.SMA(SGD(model.parameters(), lr=0.1), model, start=value)
