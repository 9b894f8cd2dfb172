"""The meta step of Fish alone, and its whole meta-iteration against the inner steps alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from contenders import FLOOR, PLAIN, Contender, Run, ours
from given import Named, Trained, case, moving, named
from torch import Tensor, nn

import fastdg
from fastdg import ops

META_RATE = 0.5
# A step along one sign is as long as the rate: it shows beside the rounding of the weights.
LEARNING_RATE = 1e-3


def stepped(on: Trained) -> tuple[list[Tensor], list[Tensor]]:
    """The weights after one step on the first domain, and those before it."""
    kept = on.start()
    for p, start, g in zip(on.weights, kept, on.lists[0], strict=True):
        p.data = start - LEARNING_RATE * g
    return [p.detach() for p in on.weights], kept


def meta_step(on: Trained) -> Run:
    weights, kept = stepped(on)
    return lambda: ops.meta_step(weights, kept, META_RATE)


def foreach_meta(weights: list[Tensor], kept: list[Tensor]) -> None:
    torch._foreach_lerp_(kept, weights, META_RATE)
    torch._foreach_copy_(weights, kept)


def foreach_meta_step(on: Trained) -> Run:
    weights, kept = stepped(on)
    return lambda: foreach_meta(weights, kept)


def meta_truth(on: Trained) -> Named:
    return named(-META_RATE * LEARNING_RATE * g.double() for g in on.lists[0])


def adam(weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(weights, lr=LEARNING_RATE)


def steps(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], lists: Sequence[Sequence[Tensor]]
) -> None:
    """One step a domain on its gradient."""
    for domain in lists:
        for p, g in zip(weights, domain, strict=True):
            p.grad = g
        optimizer.step()


def plain_steps(on: Trained) -> Run:
    optimizer = adam(on.weights)
    return lambda: steps(optimizer, on.weights, on.lists)


def fish(on: Trained) -> Run:
    """The gradients that `backward` would find are put where it leaves them: it has but one number
    of its own to differentiate."""
    level = nn.Parameter(torch.zeros(1))
    opt = fastdg.Fish(adam([*on.weights, level]), meta_lr=META_RATE, num_domains=on.domains)
    ids = torch.arange(on.domains).split(1)

    def run() -> None:
        for d, domain in enumerate(on.lists):
            level.grad = None
            opt.backward(level * 1, ids[d])
            for p, g in zip(on.weights, domain, strict=True):
                p.grad = g
            opt.step()

    return run


def foreach_fish(on: Trained) -> Run:
    optimizer = adam(on.weights)
    weights, kept = [p.detach() for p in on.weights], on.start()

    def run() -> None:
        steps(optimizer, on.weights, on.lists)
        foreach_meta(weights, kept)

    return run


def domainbed_fish(on: Trained) -> Run:
    """A second network and optimizer for each meta-iteration, and copies of whole state_dicts."""
    network = nn.ParameterList(on.weights)
    states: list[dict[str, Any]] = []

    def run() -> None:
        inner = copy.deepcopy(network)
        optimizer = adam(list(inner))
        if states:
            optimizer.load_state_dict(states.pop())
        steps(optimizer, list(inner), on.lists)
        states.append(optimizer.state_dict())
        kept, after = network.state_dict(), inner.state_dict()
        new = {name: kept[name] + META_RATE * (after[name] - kept[name]) for name in kept}
        network.load_state_dict(copy.deepcopy(new))

    return run


def fish_truth(on: Trained) -> Named:
    """Tensor by tensor in float64."""
    gone = []
    for start, stack in zip(on.start(), on.stacks, strict=True):
        p = nn.Parameter(start.double())
        steps(adam([p]), [p], [[g] for g in stack.double()])
        gone.append(META_RATE * (p.detach() - start))
    return named(gone)


def trained(on: Trained, out: Any) -> Named:
    return named(on.gone())


FISH = (
    case(
        "meta_step",
        3,
        {
            PLAIN: Contender(foreach_meta_step, result=trained),
            FLOOR: moving(lambda D: 4),
            **ours(meta_step, result=trained),
        },
        meta_truth,
        1.2,
        made=Trained,
    ),
    case(
        "Fish",
        3,
        {
            PLAIN: Contender(plain_steps, result=None),
            **ours(fish, result=trained),
            "foreach": Contender(foreach_fish, result=trained),
            "a second network (DomainBed)": Contender(domainbed_fish, result=trained),
        },
        fish_truth,
        1.04,
        made=Trained,
    ),
)
