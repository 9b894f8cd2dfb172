"""SWAD against means over all the weights there were."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import network, through_a_file, wrap
from definitions import MAKES, alike, batches, close, net
from on_device import DEVICE
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, update_bn

import fastdg

STEPS = 2  # between evaluations
FALLING = [5.0, 4.0, 3.0]
VALLEY = [*FALLING, 1.0, 1.2, 1.1, 1.3, 1.2]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_the_paper(losses: Sequence[float], Ns: int, Ne: int, r: float) -> tuple[int, int | None]:
    """First and last evaluation of the valley (its algorithm, with 1 + r for r)."""
    start, level = None, 0.0
    for i in range(len(losses)):
        if start is None:
            window = losses[i - Ns + 1 : i + 1] if i >= Ns - 1 else []
            if window and window[0] == min(window):
                start, level = i - Ns + 1, (1 + r) * sum(window) / Ns
        elif i >= Ne and level < min(losses[i - Ne + 1 : i + 1]):
            return start, i - Ne
    return (-1, None) if start is None else (start, None)


def train(
    opt: fastdg.SWAD, model: nn.Module, losses: Sequence[float], seed: int = 0
) -> list[Tensor]:
    """Evaluations with such losses; the weights after every step."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for loss in losses:
        for _ in range(STEPS):
            x = torch.randn(4, 4, generator=generator).to(next(model.parameters()).dtype)
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
            seen.append(flat(model))
        opt.evaluate(loss)
    return seen


CASES = {
    "no valley": FALLING,
    "a valley": VALLEY,
    "at once": [1.0, 1.1, 1.2, 1.1],
    "its end": [*VALLEY, *[9.0] * 6],
    "after its end": [*VALLEY, *[9.0] * 8, 0.1],
    "not quite its end": [*VALLEY, *[9.0] * 5, 1.0, 9.0],
    "twice a peak": [3.0, 1.0, 1.0, 1.1, *[9.0] * 3, 1.0, *[9.0] * 6, 5.0],
    "below 0": [-1.0, -3.0, -2.9, -2.5, -2.9, *[0.0] * 7],
}


@pytest.mark.parametrize("patience", [(3, 6), (1, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("name", CASES)
def test_averages_the_valley(name: str, patience: tuple[int, int]) -> None:
    losses, (Ns, Ne) = CASES[name], patience
    model = network(torch.float64)
    opt = fastdg.SWAD(MAKES["adam"](model), model, n_converge=Ns, n_tolerance=Ne)
    weights = train(opt, model, losses)
    positive = losses if min(losses) > 0 else [loss + 100 for loss in losses]
    ratio = 0.3
    if min(losses) <= 0:  # the paper's threshold is meant for losses above 0
        start, end = by_the_paper(positive, Ns, Ne, 1e-9)
        mean = sum(losses[start : start + Ns]) / Ns
        assert not opt.started or opt.param_groups[0]["swad_threshold"] == mean + 0.3 * abs(mean)
        return
    start, end = by_the_paper(losses, Ns, Ne, ratio)
    first = len(losses) - 1 if start == -1 else start
    last = len(losses) - 1 if end is None else end
    expected = torch.stack(weights[STEPS * first : STEPS * (last + 1)]).mean(0)
    assert opt.started == (start >= 0) and opt.finished == (end is not None)
    averaged = opt.averaged()
    close(flat(averaged.module), expected)
    assert int(averaged.n_averaged) == STEPS * (last + 1 - first)
    held = sum(len(rows) for rows in list(opt._own_state["pending"].values())[:1])
    assert held <= max(Ns, Ne - 1)
    own = flat(model)
    with opt.applied() as shown:
        assert shown is model
        close(flat(model), expected)
    assert torch.equal(flat(model), own)
    opt.apply()
    close(flat(model), expected)


def test_steps_since_the_last_evaluation_count() -> None:
    model = network(torch.float64)
    opt = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model)
    weights = train(opt, model, [1.0, 1.1, 1.2])
    for _ in range(3):
        opt.zero_grad()
        model(torch.ones(2, 4).double()).square().mean().backward()
        opt.step()
        weights.append(flat(model))
    close(flat(opt.averaged().module), torch.stack(weights).mean(0))
    early = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(RuntimeError, match=r"^SWAD: .*first step"):
        early.apply()


def test_parameters_that_the_optimizer_inside_is_given_are_averaged() -> None:
    model = network(torch.float64)
    inner = SGD(model[2].parameters(), lr=0.1)
    opt = fastdg.SWAD(inner, model)
    train(opt, model, [5.0])
    inner.add_param_group({"params": model[0].parameters()})
    before = flat(model)
    seen = train(opt, model, [4.0], seed=1)
    assert not torch.equal(seen[-1], before)
    with opt.applied():
        close(flat(model), torch.stack(seen).mean(0))


def test_parameters_that_come_later_were_there_all_the_time() -> None:
    model = network(torch.float64)
    opt = fastdg.SWAD(SGD(model[2].parameters(), lr=0.1), model)
    early = train(opt, model, [1.0, 1.1])
    opt.add_param_group({"params": model[0].parameters()})
    own = torch.cat([p.detach().flatten() for p in model[0].parameters()])
    late = train(opt, model, [1.2, 1.3, 1.4])
    size = len(own)
    assert torch.equal(early[0][:size], own)
    close(flat(opt.averaged().module)[size:], torch.stack([*early, *late]).mean(0)[size:])
    first = late[0][:size]  # the segment in which they came is the first that is known
    assert (flat(opt.averaged().module)[:size] - first).norm() < (late[-1][:size] - own).norm()


@pytest.mark.parametrize("at", [2, 5, 11])
def test_resumes_bit_for_bit(at: int) -> None:
    def made() -> tuple[nn.Module, Any]:
        model = network()
        return model, fastdg.SWAD(Adam(model.parameters(), lr=1e-2), model)

    losses = CASES["its end"]
    model, opt = made()
    train(opt, model, losses[:at])
    again, resumed = through_a_file(made, model, opt)
    third = copy.deepcopy((again, resumed))
    train(opt, model, losses[at:], seed=1)
    for other, optimizer in ((again, resumed), third):
        train(optimizer, other, losses[at:], seed=1)
        assert torch.equal(flat(model), flat(other))
        assert torch.equal(flat(opt.averaged().module), flat(optimizer.averaged().module))
        assert optimizer.finished and optimizer.steps == opt.steps
    state = opt.state_dict()
    assert state["state"].keys() == set(range(4))
    for entry in state["state"].values():
        entry.pop("swad_segment")
    with pytest.raises(ValueError, match=r"SWAD run of .* but has no swad_segment"):
        resumed.load_state_dict(state)


def test_half_precision_is_averaged_in_single() -> None:
    model = network(torch.bfloat16)
    opt = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model)
    weights = train(opt, model, [1.0] * 8)
    assert all(t.dtype == torch.float32 for t in opt._own_state["segment"].values())
    expected = torch.stack(weights).double().mean(0)
    close(
        torch.cat([w.flatten() for w in opt._mean()[0].values()]).double(),
        expected,
        1e-5,
    )
    assert next(opt.averaged().module.parameters()).dtype == torch.bfloat16


def test_everything_goes_on_as_without_it() -> None:
    """Around a chain: its backward, its statistics, its steps."""
    model, data = net(), batches(4)
    twin = copy.deepcopy(model)
    layers = ["conv", "down"]
    inner = fastdg.Fishr(fastdg.MIRO(MAKES["adam"](model), model, layers=layers), anneal_steps=1)
    opt = fastdg.SWAD(inner, model)
    other = fastdg.Fishr(fastdg.MIRO(MAKES["adam"](twin), twin, layers=layers), anneal_steps=1)
    for x, y, d in data:
        for network_, optimizer in ((model, opt), (twin, other)):
            optimizer.zero_grad()
            optimizer.backward(F.cross_entropy(network_(x), y, reduction="none"), d)
            optimizer.step()
        assert opt.statistics.keys() == other.statistics.keys()
        assert "miro" in opt.statistics
        opt.evaluate(1.0)
    alike(model, twin, 0)
    assert opt.steps == inner.steps == inner.base.steps == 4
    assert opt.tape is inner.tape
    assert repr(opt).startswith("SWAD(n_converge=3, n_tolerance=6, tolerance_ratio=0.3, rule=")
    state = opt.state_dict()
    assert {"swad_segment", "fishr_ema"} <= set().union(*state["state"].values())
    assert len(opt._mean()[0]) == len(list(model.parameters()))  # not MIRO's variances


def test_batch_norm_sees_the_data_again() -> None:
    model = net(batch_norm=True)
    opt = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model)
    data = batches(4)
    for x, y, _ in data:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    opt.evaluate(1.0)
    averaged = opt.averaged()
    assert isinstance(averaged, AveragedModel)
    before = averaged.module.norm.running_mean.clone()
    assert torch.equal(before, model.norm.running_mean)
    update_bn([x for x, _, _ in data], averaged)
    with torch.no_grad():
        maps = torch.cat([averaged.module.conv(x) for x, _, _ in data])
    means = torch.stack([averaged.module.conv(x).mean((0, 2, 3)) for x, _, _ in data]).mean(0)
    close(averaged.module.norm.running_mean, means)
    assert maps.shape[1] == 4
    own = copy.deepcopy(model.state_dict())
    with opt.applied():
        update_bn([x for x, _, _ in data], model)
        close(model.norm.running_mean, means)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own[name])


def test_what_it_refuses() -> None:
    model = network()
    opt = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(RuntimeError, match=r"^SWAD\.evaluate: "):
        opt.evaluate(1.0)
    train(opt, model, [1.0])
    for loss in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^validation_loss: "):
            opt.evaluate(loss)
    for word in (None, "low", [1.0], torch.ones(2)):
        with pytest.raises((TypeError, ValueError), match=r"^validation_loss: "):
            opt.evaluate(word)
    with opt.applied(), pytest.raises(RuntimeError, match=r"^SWAD\.step: .*applied"):
        opt.step()
    with pytest.raises(TypeError, match=r"^base: .*fastdg\.SWAD\(fastdg\.Fishr\("):
        wrap(opt)
    with pytest.raises(TypeError, match=r"^base: .*another SWAD"):
        fastdg.SWAD(opt, model)
    arguments: list[tuple[dict[str, Any], str]] = [
        ({"n_converge": 0}, "^n_converge: "),
        ({"n_tolerance": 1.5}, "^n_tolerance: "),
        ({"tolerance_ratio": -1}, "^tolerance_ratio: "),
    ]
    for more, message in arguments:
        with pytest.raises(ValueError, match=message):
            fastdg.SWAD(SGD(model.parameters()), model, **more)
    with pytest.raises(TypeError, match=r"^model: "):
        fastdg.SWAD(SGD(model.parameters()), model.parameters())
    with pytest.raises(ValueError, match=r"^model: "):
        fastdg.SWAD(SGD(model.parameters()), network())


def test_a_grad_scaler_around_a_plain_optimizer() -> None:
    model = network()
    twin = copy.deepcopy(model)
    opt, plain = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model), SGD(twin.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    x = torch.randn(4, 4)
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(opt)
    twin(x).square().mean().backward()
    plain.step()
    torch.testing.assert_close(flat(model), flat(twin))
    assert opt.steps == 1


def test_an_average_without_evaluations_is_warned_of() -> None:
    model = network()
    opt = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        opt.step()
    with pytest.warns(UserWarning, match=r"^SWAD: opt\.evaluate.* 2 steps") as caught:
        opt.apply()
    assert [w.filename for w in caught] == [__file__]
    opt.evaluate(torch.tensor([1.0]))
    opt.apply()


def test_accuracies_are_noticed() -> None:
    model = nn.Linear(2, 2)
    opt = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model)
    opt.zero_grad()
    with pytest.warns(UserWarning, match=r"^validation_loss: .*rose at every evaluation"):
        for value in range(50, 90, 2):
            opt.step()
            opt.evaluate(value)
            if opt.finished:
                break
    other = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model)
    for value in [3.0, 1.0, *range(2, 20)]:  # a valley, and overfitting
        if not other.finished:
            other.step()
            other.evaluate(value)
    assert other.finished


def test_losses_of_a_resumed_run_may_rise() -> None:
    model = nn.Linear(2, 2)
    opt, other = (fastdg.SWAD(SGD(model.parameters(), lr=0.1), model) for _ in range(2))
    opt.zero_grad()
    for value in (3.0, 1.0):
        opt.step()
        opt.evaluate(value)
    other.load_state_dict(opt.state_dict())
    for value in range(2, 20):
        if not other.finished:
            other.step()
            other.evaluate(value)
    assert other.finished


def test_averages_shown_inside_averages_still_refuse_a_step() -> None:
    model = nn.Linear(2, 2)
    opt = fastdg.SMA(SGD(model.parameters(), lr=0.1), model, start=1)
    opt.zero_grad()
    opt.step()
    with opt.applied():
        with opt.applied():
            pass
        with pytest.raises(RuntimeError, match="averaged weights inside `applied`"):
            opt.step()
    opt.step()
