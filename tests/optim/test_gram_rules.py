"""The weightings as algorithms: a gradient for each domain, the rule, a step; state, schedules."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import EVERY, seeded
from definitions import MAKES, alike, batches, close, losses_of, net
from on_device import DEVICE
from runs import Run
from surgeries import gram_rule, step, surgery
from torch.optim import SGD

import fastdg
from fastdg import weightings as W

# Each with arguments that are not the defaults, so that a wrapper that loses one is seen
SETTINGS: dict[str, dict[str, Any]] = {
    "MGDA": {},
    "CAGrad": {"c": 0.4, "rescale": 1, "reduction": "sum"},
    "UPGrad": {"reg_eps": 1e-3},
    "DualProj": {"reg_eps": 1e-3},
    "IMTLG": {},
    "AlignedMTL": {"reduction": "sum"},
    "ConFIG": {},
    "NashMTL": {"update_every": 2, "frobenius": True, "max_norm": 0.5},
    "FairGrad": {"alpha": 2.0},
    "GradVac": {"beta": 0.1, "reduction": "mean"},
}
KEEPING = ("NashMTL", "GradVac")


def drawing(name: str) -> dict[str, Any]:
    return {"generator": seeded()} if name == "GradVac" else {}


def test_every_weighting_is_an_algorithm() -> None:
    assert {*SETTINGS, "GramWeighting"} == set(W.__all__)
    for name in SETTINGS:
        assert getattr(fastdg, name).rule is getattr(W, name)
        assert name in EVERY


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_definition(name: str, batch_norm: bool) -> None:
    """Over ragged domains, with momentum; in batches that lack one, of the others alone."""
    model, more = net(), SETTINGS[name]
    twin = copy.deepcopy(model)
    opt = getattr(fastdg, name)(MAKES["momentum"](model), num_domains=3, **more, **drawing(name))
    base, rule = MAKES["momentum"](twin), getattr(W, name)(**more, **drawing(name))
    for batch in batches(5, absent=name not in KEEPING):
        step(lambda rows: gram_rule(rows, rule), twin, base, batch)
        opt.zero_grad()
        if batch_norm:  # a forward for each domain
            x, y, domains = batch
            present = sorted(set(domains.tolist()))
            for d in present:
                rows = domains == d
                losses = losses_of(model, x[rows], y[rows])
                opt.backward(losses, domains[rows], final=d == present[-1])
        else:
            opt.backward(losses_of(model, *batch[:2]), batch[2])
        opt.step()
        alike(model, twin, 1e-8)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_domain_alone_is_plain_training(name: str) -> None:
    g = torch.randn(1, 6)
    grad, _ = surgery(getattr(fastdg, name), g, **drawing(name))
    close(grad, g[0].double())


@pytest.mark.parametrize("name", SETTINGS)
def test_small_gradients(name: str) -> None:
    """1e-12 of the size: the same direction, in float32 too."""
    g = torch.tensor([[1.0, 0.5, 0.0], [-0.6, 0.5, 0.3], [0.1, -0.2, 0.9]])
    found = [surgery(getattr(fastdg, name), s * g, **drawing(name))[0] for s in (1.0, 1e-12)]
    one, other = (grad / grad.norm() for grad in found)
    close(one, other, 1e-6)


def test_schedules_reach_the_rule() -> None:
    g = torch.randn(3, 6)
    _, opt = surgery(fastdg.CAGrad, g)
    opt.param_groups[0]["cagrad_c"] = 0.0
    model = next(iter(opt._names))
    assert opt.c == 0.0 and model.grad is not None
    with pytest.raises(ValueError, match=r"^c: .*got -1"):
        opt.c = -1.0
    found = opt.ask(torch.eye(3))
    close(found, torch.full((3,), 1 / 3), 1e-7)
    opt.c = 0.5
    assert not torch.equal(opt.ask(torch.eye(3)), found)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("CAGrad", "c", -1),
        ("CAGrad", "rescale", 3),
        ("CAGrad", "reduction", "max"),
        ("UPGrad", "reg_eps", -1),
        ("NashMTL", "update_every", 0),
        ("NashMTL", "max_norm", 0),
        ("FairGrad", "alpha", 0),
        ("GradVac", "beta", 2),
        ("MGDA", "absent", "never"),
    ],
)
def test_arguments(name: str, argument: str, value: Any) -> None:
    base = SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"^{argument}: .*got "):
        getattr(fastdg, name)(base, **{argument: value})
    for taken in ("weighting", "normalize"):
        with pytest.raises(TypeError, match=rf"^{taken}: {name} has no such argument"):
            getattr(fastdg, name)(base, **{taken: None})


# -- state --


def run(name: str) -> Run:
    more = SETTINGS[name]
    return Run(lambda o, m: getattr(fastdg, name)(o, num_domains=3, **more, **drawing(name)))


def through_a_file(first: Run, again: Run) -> Run:
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    again.load(torch.load(file, weights_only=True))
    return again


WAYS: dict[str, Callable[[Run, Run], Run]] = {
    "file": through_a_file,
    "deepcopy": lambda first, again: copy.deepcopy(first),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_goes_on_bit_for_bit(name: str, way: str) -> None:
    first = run(name)
    for _ in range(3):
        first.step()
    again = WAYS[way](first, run(name))
    for each in (first, again):
        torch.manual_seed(3)
        for _ in range(3):
            each.step()
    for p, q in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", KEEPING)
def test_a_step_that_a_scaler_skips_leaves_the_state(name: str) -> None:
    model = torch.nn.Linear(4, 3)
    opt = getattr(fastdg, name)(SGD(model.parameters(), 0.1), num_domains=3, **SETTINGS[name])
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)

    def take(factor: float) -> Any:
        opt.zero_grad()
        x = torch.randn(12, 4) * factor
        opt.backward(model(x).square().sum(1), torch.arange(12) % 3, scaler=scaler)
        scaler.step(opt)
        scaler.update()
        return copy.deepcopy(opt.weighting.state_dict())

    before, after = take(1.0), take(float("inf"))
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert opt.steps == 1


def test_nash_mtl_solved_in_every_step_keeps_nothing() -> None:
    opt = fastdg.NashMTL(SGD(torch.nn.Linear(2, 2).parameters(), 0.1))
    assert not opt.keeps_state
    opt.update_every = 3
    assert opt.keeps_state  # before the first step, in which it decides on absent domains
    assert fastdg.NashMTL(SGD(torch.nn.Linear(2, 2).parameters(), 0.1), update_every=2).keeps_state
