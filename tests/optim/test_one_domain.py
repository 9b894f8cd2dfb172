"""Algorithms that compare domains say so where a training loop shows them one at a time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import even
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import fastdg
from fastdg.core import one_domain

COMPARE: dict[str, Callable[..., Any]] = {
    "Fishr": lambda o, **n: fastdg.Fishr(o, anneal_steps=3, **n),
    "Fishr, all layers": lambda o, **n: fastdg.Fishr(o, params="all", **n),
    "AgrSum": fastdg.AgrSum,
    "AgrRand": fastdg.AgrRand,
    "PCGrad": fastdg.PCGrad,
    "GramSurgery": lambda o, **n: fastdg.GramSurgery(o, even, **n),
    "CAGrad": fastdg.CAGrad,
    "ANDMask": fastdg.ANDMask,
    "SANDMask": lambda o, **n: fastdg.SANDMask(o, threshold=0.5, **n),
    "IGA": lambda o, **n: fastdg.IGA(o, penalty_weight=0.1, **n),
    "VREx": fastdg.VREx,
    "GroupDRO": fastdg.GroupDRO,
}
OTHERS: dict[str, Callable[..., Any]] = {
    "ERM": fastdg.ERM,
    "IRM": fastdg.IRM,  # its penalty is one of each domain for itself
    "Fish": lambda o, num_domains: fastdg.Fish(o, num_domains=3),  # steps of one domain each
}
DOMAINS = (None, 3)


class Loop:
    """A training on a small network, and the warnings of it."""

    def __init__(self, make: Callable[..., Any], **more: Any) -> None:
        self.model = nn.Linear(4, 3)
        self.opt = make(SGD(self.model.parameters(), lr=0.01), **more)
        self.said: list[warnings.WarningMessage] = []

    def backward(self, *ids: int, final: bool = True) -> None:
        losses = self.model(torch.randn(len(ids), 4)).square().sum(1)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.opt.backward(losses, torch.tensor(ids), final)
        self.said += said

    def step(self, *ids: int) -> None:
        self.opt.zero_grad()
        self.backward(*ids)
        self.opt.step()

    @property
    def texts(self) -> list[str]:
        return [str(warning.message) for warning in self.said]


@pytest.mark.parametrize("num_domains", DOMAINS)
@pytest.mark.parametrize("name", COMPARE)
def test_final_is_forgotten(name: str, num_domains: int | None) -> None:
    loop = Loop(COMPARE[name], num_domains=num_domains)
    for _ in range(2):
        loop.opt.zero_grad()
        for d in range(3):
            loop.backward(d, d)
            assert len(loop.said) == (d > 0 or loop.opt.steps > 0)
        loop.opt.step()
    assert loop.texts == [
        f"domains: {name.split(',')[0]} compares the domains of a step, but the 2 backward calls "
        "of this step saw one domain each, got domains 0, 1. Their sum is the gradient of plain "
        "training. Pass final=False to all backward calls of a step except the last, or mix the "
        "domains in each batch."
    ]
    assert loop.said[0].filename == __file__


@pytest.mark.parametrize("num_domains", DOMAINS)
@pytest.mark.parametrize("name", COMPARE)
def test_batches_of_one_domain(name: str, num_domains: int | None) -> None:
    loop = Loop(COMPARE[name], num_domains=num_domains)
    for step in range(24):
        assert len(loop.said) == (step >= one_domain.FIRST)
        loop.step(step % 3, step % 3)
    assert loop.texts == [
        f"domains: {name.split(',')[0]} compares the domains of a step, but each of the last 20 "
        "steps saw one domain only and was plain training. Mix the domains in each batch, or "
        "run a batch of each domain in every step, with backward(losses, domains, final=False) "
        "for all except the last."
    ]


@pytest.mark.parametrize("num_domains", DOMAINS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_algorithms_may_see_one_domain(name: str, num_domains: int | None) -> None:
    loop = Loop(OTHERS[name], num_domains=num_domains)
    for step in range(24):
        loop.step(step % 3, step % 3)
    if name != "Fish":  # whose next step is on another domain
        loop.opt.zero_grad()
        for d in range(3):
            loop.backward(d, d)
    assert not any("compares" in text for text in loop.texts)


@pytest.mark.parametrize("name", COMPARE)
def test_right_loops_hear_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_domain, "FIRST", 4)
    monkeypatch.setattr(one_domain, "LATER", 8)
    loop = Loop(COMPARE[name])
    for step in range(one_domain.LATER + 10):  # a batch of one domain now and then
        loop.step(0, 0) if step % 7 else loop.step(0, 1)
    loop = Loop(COMPARE[name])
    for _ in range(3):
        for _ in range(2):
            loop.step(0, 1, 2)
        loop.step(2)  # the ragged last batch of an epoch
    loop = Loop(COMPARE[name])
    for _ in range(one_domain.FIRST + 5):
        loop.opt.zero_grad()
        for d in range(3):
            loop.backward(d, d, final=d == 2)
        loop.opt.step()
    for _ in range(3):  # two losses of one batch, and batches that add up
        loop.opt.zero_grad()
        loop.backward(0, 1)
        loop.backward(0, 1)
        loop.backward(2)
        loop.opt.step()
    assert not loop.texts


def test_calls_that_are_no_step_together() -> None:
    loop = Loop(fastdg.PCGrad)
    loop.backward(0, 0)
    loop.opt.zero_grad()
    loop.backward(1, 1)
    loop.backward(1)  # two losses of one domain
    loop.model.zero_grad()  # past the wrapper
    loop.backward(2)
    assert not loop.texts
    loop.backward(0)
    assert len(loop.texts) == 1


def test_a_long_row_after_mixed_batches() -> None:
    """As from samples that are sorted by domain."""
    loop = Loop(fastdg.VREx)
    loop.step(0, 1)
    for _ in range(one_domain.LATER - 1):
        loop.step(1, 1)
    assert not loop.texts
    loop.step(1, 1)
    assert "but each of the last 100 steps saw one domain only" in loop.texts[0]
    for _ in range(one_domain.LATER):
        loop.step(0, 0)
    assert len(loop.texts) == 1  # once
    loop.opt = copy.deepcopy(loop.opt)
    loop.model.weight, loop.model.bias = loop.opt.param_groups[0]["params"]
    for _ in range(one_domain.FIRST):
        loop.step(0, 0)
    assert len(loop.texts) == 2  # of another optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda o: fastdg.PCGrad(o, num_domains=1),
        lambda o: fastdg.Fishr(o, penalty_weight=0.0),
        lambda o: fastdg.VREx(o, penalty_weight=0.0),
    ],
    ids=["num_domains=1", "Fishr without weight", "VREx without weight"],
)
def test_who_asked_for_it_hears_nothing(make: Callable[[Optimizer], Any]) -> None:
    loop = Loop(make)
    for _ in range(one_domain.FIRST + 1):
        loop.step(0, 0)
    assert not loop.texts


def test_inside_an_average() -> None:
    torch.manual_seed(0)
    loop = Loop(lambda o: o)
    loop.opt = fastdg.SWAD(fastdg.PCGrad(loop.opt), loop.model)
    for _ in range(one_domain.FIRST):
        loop.step(0, 0)
    assert "PCGrad compares" in loop.texts[0]


def test_counts_on_a_device_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later call looks at them, once their copies are there."""
    events: list[Event] = []

    class Event:
        def __init__(self, device: torch.device) -> None:
            events.append(self)
            self.done = False

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return self.done

    monkeypatch.setattr(one_domain, "readable", lambda tensor: False)
    monkeypatch.setattr(torch, "Event", Event)
    loop = Loop(fastdg.PCGrad)
    for step in range(one_domain.FIRST + 8):
        if step >= 5:
            events[step - 5].done = True  # the device is five steps behind
        loop.step(0, 0)
        assert len(loop.texts) == (step >= one_domain.FIRST + 4)


def test_compiled_steps_are_seen() -> None:
    model = nn.Linear(4, 3)
    opt = fastdg.VREx(SGD(model.parameters(), lr=0.01), num_domains=3)

    def forward(x: Tensor) -> Tensor:
        return model(x).square().sum(1)

    backward = fastdg.compiled(opt, forward, backend="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(one_domain.FIRST + 3):
            opt.zero_grad()
            backward(torch.randn(2, 4), domains=torch.full((2,), step % 3))
            opt.step()
    (warning,) = (w for w in said if "compares" in str(w.message))
    assert "each of the last 20 steps saw one domain only" in str(warning.message)
    assert warning.filename == __file__
