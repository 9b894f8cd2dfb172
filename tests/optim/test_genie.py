"""GENIE against its formula written out on histories and on samples, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import seeded, through_a_file
from definitions import Batch, alike, batches, close, losses_of, net
from on_device import DEVICE
from torch import Tensor, nn
from torch.optim import SGD

import fastdg

Judge = Callable[[int, Tensor], tuple[Tensor, Tensor, Tensor]]


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.015)


def move(p: Tensor, m: Tensor, v: Tensor, vm: Tensor, generator: torch.Generator) -> None:
    """One parameter's step, as the authors write it."""
    v = torch.where(v > 0, v, 1e-8)
    vm = torch.where(vm > 0, vm, 1e-8)
    tau = torch.tanh(torch.clamp(1 / v, max=10))
    q = 1 / (1 + vm / (m**2 + 1e-8))
    sigma = (tau * m.abs() * q).sum() / tau.sum()
    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype) * sigma * (1 - tau)
    mask = (torch.rand(p.shape, generator=generator, dtype=p.dtype) > 0.4).double() / 0.6
    p.data -= 0.015 * mask * (m * q * tau + noise)


def history(model: nn.Module, data: list[Batch], decay: float) -> None:
    """Means over all steps so far, with their weights, in place of recursions."""
    generator = seeded()
    seen: dict[Tensor, list[Tensor]] = {p: [] for p in model.parameters()}
    for x, y, _ in data:
        model.zero_grad()
        losses_of(model, x, y).mean().backward()
        for p, gradients in seen.items():
            gradients.append(p.grad + decay * p.detach())
            t = len(gradients)
            weights = torch.tensor([0.95 ** (t - 1 - k) for k in range(t)], dtype=torch.float64)
            weights = weights / weights.sum()
            stacked = torch.stack(gradients)
            shape = (t, *(1 for _ in p.shape))
            m = (weights.view(shape) * stacked).sum(0)
            spread = (weights.view(shape) * (stacked - m) ** 2).sum(0)
            rho = (weights**2).sum()  # of the mean's variance
            v = spread / (1 - rho) if t > 1 else torch.zeros_like(m)
            move(p, m, v, rho * torch.where(v > 0, v, 1e-8), generator)


def of_samples(model: nn.Module, data: list[Batch], decay: float) -> None:
    generator = seeded()
    for x, y, _ in data:
        parameters, found = [*model.parameters()], []
        for loss in losses_of(model, x, y):
            grads = torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            found.append(grads)
        for p, samples in zip(parameters, zip(*found, strict=True), strict=True):
            stacked = torch.stack(samples)
            v = stacked.var(0)
            m = stacked.mean(0) + decay * p.detach()
            move(p, m, v, torch.where(v > 0, v, 1e-8) / len(stacked), generator)


TRUTH = {"history": history, "batch": of_samples}


def go(opt: Any, model: nn.Module, data: list[Batch], way: str = "whole") -> None:
    for x, y, domains in data:
        opt.zero_grad()
        parts = 3 if way == "micro-batches" else 1
        cuts = [z.tensor_split(parts) for z in (x, y, domains)]
        for k, (a, b, d) in enumerate(zip(*cuts, strict=True)):
            opt.backward(losses_of(model, a, b), d, final=k == parts - 1)
        opt.step()


@pytest.mark.parametrize("way", ["whole", "micro-batches"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("variance", TRUTH)
def test_definition(variance: str, decay: float, way: str) -> None:
    model, data = net(), batches(5)
    twin = copy.deepcopy(model)
    opt = fastdg.GENIE(sgd(model), variance=variance, weight_decay=decay, generator=seeded())
    go(opt, model, data, way)
    TRUTH[variance](twin, data, decay)
    alike(model, twin, 1e-11)


def test_what_the_authors_code_gave() -> None:
    """``GENIE`` of 00ssum/GENIE at 9785479 on gradients whose first ones are powers of two, so that
    its first variances are exact zeros; it draws the same numbers. Its mask is in float64 here."""
    w = nn.Parameter(torch.tensor([[0.5, -0.25, 1.0], [0.75, 0.125, -0.5]], dtype=torch.float64))
    b = nn.Parameter(torch.tensor([0.1, -0.2], dtype=torch.float64))
    opt = fastdg.GENIE(SGD([w, b], lr=0.015))
    torch.manual_seed(7)
    for gradient, expected in zip(GIVEN, GAVE, strict=True):
        g = torch.tensor(gradient, dtype=torch.float64)
        opt.zero_grad()
        opt.backward(((w * g.view(2, 3)).sum() + (b * g[:2]).sum()).reshape(1), 0)
        opt.step()
        close(torch.cat([w.flatten(), b]), torch.tensor(expected, dtype=torch.float64), 1e-12)


GIVEN = [
    [0.5, -1.0, 2.0, -0.25, 0.125, 4.0],
    [0.3, -0.7, 1.1, 0.2, -0.4, 3.0],
    [0.45, -0.9, 0.6, -0.3, 0.05, 2.5],
    [-0.2, -1.3, 0.8, 0.1, 0.15, 3.5],
]
GAVE = [
    [
        *(0.5, -0.22500000045939367, 0.9500000002030452, 0.7562499991249656),
        *(0.125, -0.5, 0.1, -0.17500000037165028),
    ],
    [
        *(0.49065604798217133, -0.22500000045939367, 0.9142084613265462, 0.7562534832926441),
        *(0.12583567314824845, -0.5815281581290938, 0.09065604813276927, -0.17500000037165028),
    ],
    [
        *(0.4804696763962115, -0.22500000045939367, 0.8881729279145592, 0.7572893326845302),
        *(0.12583567314824845, -0.6543398133857743, 0.08046967644949092, -0.17500000037165028),
    ],
    [
        *(0.47609660211809957, -0.20084867829490022, 0.862679836610397, 0.7575590453303944),
        *(0.12584093259986248, -0.734019233836894, 0.07609660155368565, -0.15084867819706402),
    ],
]


def test_the_gradient_is_there_after_the_step() -> None:
    model, (batch,) = net(), batches(1)
    opt = fastdg.GENIE(sgd(model))
    opt.backward(losses_of(model, *batch[:2]), batch[2])
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_the_gradient_is_there_after_a_step_that_failed() -> None:
    class Fails(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise KeyError("disk")

    model, (batch,) = net(), batches(1)
    opt = fastdg.GENIE(Fails(model.parameters(), lr=0.1))
    opt.backward(losses_of(model, *batch[:2]), batch[2])
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(KeyError, match="disk"):
        opt.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("size", [3e19, 1e20, 1e25])
@pytest.mark.parametrize("variance", TRUTH)
def test_squares_that_overflow(variance: str, size: float) -> None:
    """Gradients in float32 that are finite: a step in that direction, or none, but no NaN."""
    model = nn.Linear(4, 1, bias=False)
    opt = fastdg.GENIE(SGD(model.parameters(), lr=1e-20), variance=variance, dropped=0.0)
    for sign in (1.0, 0.9, -1.0):
        opt.zero_grad()
        x = torch.tensor([[1.0], [-1.0], [0.5]]) * torch.tensor([size, 1.0, -1.0, 0.0])
        opt.backward(model(x * sign).flatten(), 0)
        opt.step()
        assert model.weight.isfinite().all()


@pytest.mark.parametrize("variance", TRUTH)
def test_nan_comes_through(variance: str) -> None:
    model = nn.Linear(4, 1, bias=False)
    opt = fastdg.GENIE(SGD(model.parameters(), lr=0.1), variance=variance, dropped=0.0)
    for factor in (1.0, torch.nan):
        opt.zero_grad()
        opt.backward(model(torch.randn(3, 4) * factor).flatten(), 0)
        opt.step()
    assert model.weight.isnan().all()


@pytest.mark.parametrize("variance", TRUTH)
def test_goes_on_bit_for_bit(variance: str) -> None:
    data = batches(6)

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(2)
        model = net()
        return model, fastdg.GENIE(sgd(model), variance=variance, generator=seeded())

    model, opt = made()
    go(opt, model, data[:3])
    again, other = through_a_file(made, model, opt)
    third = copy.deepcopy((model, opt))
    go(opt, model, data[3:])
    for m, o in ((again, other), third):
        go(o, m, data[3:])
        alike(model, m, 0)


@pytest.mark.parametrize("variance", TRUTH)
def test_no_scale_leaves_a_trace(variance: str) -> None:
    data, ends = batches(4), []
    for scaler in (None, torch.amp.GradScaler(DEVICE, init_scale=1024.0)):
        torch.manual_seed(2)
        model = net()
        opt = fastdg.GENIE(sgd(model), variance=variance, generator=seeded())
        for k, (x, y, domains) in enumerate(data):
            if scaler is not None and k == 2:  # a step that is skipped moves nothing
                opt.zero_grad()
                losses = losses_of(model, x, y) * torch.inf
                opt.backward(losses, domains, scaler=scaler)
                scaler.step(opt)
                scaler.update()
            opt.zero_grad()
            opt.backward(losses_of(model, x, y), domains, scaler=scaler)
            if scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
        ends.append(model)
    alike(ends[1], ends[0], 1e-11)


def test_one_sample_has_no_variance() -> None:
    model = net()
    opt = fastdg.GENIE(sgd(model), variance="batch")
    opt.backward(losses_of(model, torch.randn(1, 2, 6, 6).double(), torch.tensor([1])), 0)
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("variance", "true"),
        ("decay", 1.0),
        ("decay", None),
        ("dropped", 1.0),
        ("weight_decay", -1),
    ],
)
def test_arguments(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: .*got "):
        fastdg.GENIE(SGD(nn.Linear(2, 2).parameters(), 0.1), **{argument: value})


@pytest.mark.parametrize("maximize", [False, True])
def test_weight_decay_shrinks_the_weights(maximize: bool) -> None:
    p = nn.Parameter(torch.full((3,), 2.0))
    base = SGD([p], lr=0.5, maximize=maximize)
    opt = fastdg.GENIE(base, weight_decay=1.0, dropped=0.0, generator=torch.Generator())
    for _ in range(3):
        opt.zero_grad()
        opt.backward((p * 0).sum().unsqueeze(0), 0)
        opt.step()
    assert bool((p.detach() < 2).all())


def test_a_state_of_the_other_variance_leaves_no_old_averages() -> None:
    p = nn.Parameter(torch.ones(3))
    history, batch = (fastdg.GENIE(SGD([p], lr=0.1), variance=v) for v in ("history", "batch"))
    history.backward(p.square().sum().unsqueeze(0), 0)
    history.step()
    batch.load_state_dict(history.state_dict())
    assert not any("genie_mean" in entry for entry in batch.state_dict()["state"].values())
