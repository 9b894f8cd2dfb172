"""Compiled training steps: the plain one, the eager wrapper, and forward and backward in one graph.

What a contender runs is verified as it is timed: compiled, and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import surgery_cases as surgery
import torch
from contenders import OURS, PLAIN, Case, Contender, Run
from head_peers import adam, plain
from models import Problem
from torch import Tensor
from torch.nn import functional as F

import fastdg

Wrap = Callable[..., fastdg.DomainOptimizer]
WARM = 3  # steps until everything is compiled


def fishr(params: str) -> Wrap:
    return lambda base, **more: fastdg.Fishr(
        base, params=params, anneal_steps=0, ema=None, num_domains=3, check=False, **more
    )


def agr_sum(base: Any) -> fastdg.DomainOptimizer:
    return fastdg.AgrSum(base, num_domains=3, check=False)


def steps(on: Problem, opt: Any, backward: Callable[[], Any]) -> Run:
    """Training steps, of which the first are over."""

    def run() -> None:
        opt.zero_grad()
        backward()
        opt.step()

    for _ in range(WARM):
        opt.zero_grad()
        backward()
    return run


def eager(wrap: Wrap) -> Callable[[Problem], Run]:
    def make(on: Problem) -> Run:
        opt = wrap(adam(on))
        return steps(on, opt, lambda: opt.backward(on.losses(), on.domains))

    return make


def whole(wrap: Wrap) -> Callable[[Problem], Run]:
    """Forward and backward in one graph."""

    def make(on: Problem) -> Run:
        def forward(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(on.model(x), y, reduction="none")

        opt = wrap(adam(on))
        backward = fastdg.compiled(opt, forward)
        return steps(on, opt, lambda: backward(on.x, on.y, domains=on.domains))

    return make


def below(wrap: Wrap) -> Callable[[Problem], Run]:
    """What is below the head compiled, the head eager."""

    def make(on: Problem) -> Run:
        opt = wrap(adam(on), model=on.model)
        features, head = torch.compile(on.model.features), on.model.head

        def backward() -> None:
            losses = F.cross_entropy(head(features(on.x)), on.y, reduction="none")
            opt.backward(losses, on.domains)

        return steps(on, opt, backward)

    return make


def compiled_plain(on: Problem) -> Run:
    on.model = torch.compile(on.model)
    return plain(on, adam(on))


def truth(wrap: Wrap) -> Callable[[Problem], Mapping[str, Tensor]]:
    """The eager wrapper's gradient in float64, which is compared with other truths elsewhere."""

    def made(on: Problem) -> Mapping[str, Tensor]:
        eager(wrap)(on)
        return surgery.gradients(on, None)

    return made


def case(question: str, model: str, wrap: Wrap, tolerance: float, **more: Any) -> Case:
    result = surgery.gradients
    contenders = {
        PLAIN: Contender(lambda on: plain(on, adam(on)), result=None),
        f"{PLAIN}, model compiled": Contender(compiled_plain, result=None, slow=True),
        OURS: Contender(whole(wrap), result=result, slow=True),
        f"{OURS}, eager": Contender(eager(wrap), result=result),
        **{name: Contender(make, result=result, slow=True) for name, make in more.items()},
    }
    return Case(
        f"compiled {question}",
        model,
        96,
        contenders,
        truth(wrap),
        lambda on: 1.0,
        1.0,
        tolerance=tolerance,
    )


COMPILED = (
    case("Fishr, all layers", "mlp", fishr("all"), 1e-3),
    case("Fishr, all layers", "mnist_cnn", fishr("all"), 1e-2),
    case("Agr-Sum, D=3", "vit", agr_sum, 0.15),
    case(
        "Fishr (head)",
        "resnet18",
        fishr("head"),
        1e-2,
        **{f"{OURS}, network below the head compiled": below(fishr("head"))},
    ),
)
