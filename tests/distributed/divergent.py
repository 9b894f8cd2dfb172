"""Trainings whose ranks have other settings, or come to have them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from parallel import Net, errors, losses_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam

import fastdg

CASES: dict[str, Callable[[Any, Any, bool], Any]] = {
    "weight": lambda base, model, other: fastdg.VREx(base, penalty_weight=2.0 if other else 1.0),
    "domains": lambda base, model, other: fastdg.PCGrad(base, num_domains=4 if other else 3),
    "many domains": lambda base, model, other: fastdg.VREx(base, num_domains=99 if other else 3),
    "algorithm": lambda base, model, other: (fastdg.AgrSum if other else fastdg.PCGrad)(base),
    "params": lambda base, model, other: fastdg.Fishr(
        base, params=["body.weight", "head.bias"] if other else ["body.weight"], model=model
    ),
    "term": lambda base, model, other: fastdg.Fishr(
        fastdg.MIRO(base, model, layers=["body"], weight=0.2 if other else 0.1)
    ),
    "around a term": lambda base, model, other: fastdg.Fishr(
        fastdg.MIRO(base, model, layers=["body"]), anneal_steps=7 if other else 9
    ),
    "no term": lambda base, model, other: fastdg.VREx(
        fastdg.MIRO(base, model, layers=["body"]) if other else base
    ),
    "weighting": lambda base, model, other: fastdg.GramSurgery(base, last if other else first),
}


def first(gram: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(gram))[0]


def last(gram: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(gram))[-1]


def diverge(case: str, rank: int, world: int) -> tuple[str, bool]:
    """The error of the first step, and whether it has left no gradient."""
    torch.manual_seed(0)
    model = Net()
    network = DistributedDataParallel(model)
    base: Any = SGD(model.parameters(), lr=0.1)
    if case == "base":
        base = Adam(model.parameters()) if rank else base
        opt: Any = fastdg.VREx(base)
    else:
        opt = CASES[case](base, model, rank == world - 1)
    losses = losses_of(network)
    text = errors(lambda: opt.backward(losses, torch.arange(6) % 3))
    return text, all(p.grad is None for p in model.parameters())


def schedule(alike: bool, rank: int, world: int) -> tuple[str, int]:
    """The error of a training in which settings move, on all ranks or on one; and its steps."""
    torch.manual_seed(0)
    model = Net()
    opt = fastdg.VREx(SGD(model.parameters(), lr=0.1), anneal_steps=0)
    network: nn.Module = DistributedDataParallel(model)

    def step() -> None:
        opt.zero_grad()
        opt.backward(losses_of(network), torch.arange(6) % 3)
        opt.step()

    for moved in range(3):
        if alike or rank:
            opt.param_groups[0]["vrex_penalty_weight"] = 1.0 + (moved // 2)
        else:
            opt.penalty_weight = 1.0
        if text := errors(step):
            return text, opt.steps
    return "", opt.steps


def one_domain_each(rank: int, world: int) -> list[str]:
    """The warnings of a training in which every rank has a domain of its own, or all have one."""
    model = Net()
    network = DistributedDataParallel(model)
    opt = fastdg.VREx(SGD(model.parameters(), lr=0.01))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(46):
            opt.zero_grad()
            domain = rank if step < 23 else 0
            opt.backward(losses_of(network), torch.full((6,), domain))
            opt.step()
            if step == 22:
                assert not said
                opt._one_domain.mixed = False  # or it takes a hundred
    return [str(warning.message) for warning in said]
