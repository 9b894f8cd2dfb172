"""Nested wrappers: terms around the optimizer, one algorithm around these, SWAD outermost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed.global_batch import GlobalBatch
from ..distributed.handshake import shown
from .base_optimizer import Wrapping
from .batch import PenaltyOutput
from .hyper import nearest


class Penalty(Protocol):
    """Interface of a term inside a wrapper; `Term` implements it."""

    def inputs(self) -> dict[str, bool]: ...
    def added(self, losses: Tensor, inputs: Mapping[str, Any]) -> PenaltyOutput: ...
    def modules(self) -> Sequence[nn.Module]: ...


TermStatistics = tuple[
    int, Tensor, Mapping[str, Tensor]
]  # samples, mean of the penalties, statistics


def chain(opt: Optimizer) -> Iterator[Wrapping]:
    """Yield ``opt`` and every wrapper inside it, outermost first."""
    while isinstance(opt, Wrapping):
        yield opt
        opt = opt.base


def around(opt: Wrapping) -> Iterator[Wrapping]:
    """Yield every wrapper around ``opt``, innermost first."""
    outer = opt._outer
    while outer is not None and (link := outer()) is not None:
        yield link
        outer = link._outer


def innermost(opt: Optimizer) -> Optimizer:
    """Return the plain optimizer inside all wrappers."""
    while isinstance(opt, Wrapping):
        opt = opt.base
    return opt


def terms_of(opt: Optimizer) -> list[Penalty]:
    """Return the terms among ``opt`` and the wrappers inside it, outermost first."""
    return [cast("Penalty", link) for link in chain(opt) if link.role == "term"]


def settings_of(opt: Optimizer) -> dict[str, str]:
    """Return the names and settings of all wrappers, for a comparison between ranks."""
    links = list(chain(opt))
    names = [type(link).__name__ for link in (*links, innermost(opt))]
    return {
        "opt": "(".join(names) + ")" * len(links),
        **{
            f"{type(link).__name__}.{name}": shown(value)
            for link in links
            for name, value in link.settings().items()
        },
    }


def check_order(outer: Wrapping, base: Any) -> None:
    """Raise TypeError if ``outer`` cannot go around ``base``."""
    if not isinstance(base, Wrapping) or base.role == "term":
        return
    if outer.role == "average" and base.role in ("algorithm", "ascent"):
        return
    ascends = outer.role == "ascent" and base.role == "algorithm"
    if ascends and outer.around_algorithms and base.steps_without_closure:
        return
    name, inner = type(outer).__name__, type(base).__name__
    if outer.role == base.role == "average":
        advice = "one average of the weights is enough"
        shown = f"Pass its base to {name}"
    elif base.role == "average":
        advice = f"{inner} averages the weights and goes outermost"
        shown = f"Use fastdg.{inner}(fastdg.{name}(optimizer, ...), model)"
    elif base.role == "ascent":
        advice = f"{inner} takes the gradient of other wrappers at several weights"
        shown = f"Use fastdg.{inner}(fastdg.{name}(optimizer, ...))"
        could = base.around_algorithms and outer.steps_without_closure
        if outer.role == "ascent" or (outer.role == "algorithm" and not could):
            advice = f"{inner} moves the weights too"
            shown = f"Pass its base to {name}"
    elif outer.role == "ascent" and not base.steps_without_closure:
        advice = f"{inner} runs the closure itself, at weights of its own"
        shown = f"Pass the optimizer inside to {name}"
    elif outer.role == "ascent":
        advice = f"{name} has an objective of its own"
        shown = f"Pass the optimizer inside to {name}, or use fastdg.SAM"
    elif outer.role == "term":
        advice = f"{inner} is an algorithm and goes around the terms"
        shown = f"Use fastdg.{inner}(fastdg.{name}(optimizer, ...), ...)"
    else:
        advice = "two algorithms do not nest, since each computes the gradient of the step"
        shown = f"Pass the optimizer inside to {name}"
    what = f"another {inner}" if name == inner else inner
    raise TypeError(f"base: {name} cannot go around {what}: {advice}. {shown}.")


def collect_penalties(
    terms: Sequence[Penalty],
    losses: Tensor,
    inputs: Mapping[str, Any],
    name: str,
    own: Sequence[str] = (),
) -> PenaltyOutput | None:
    """Sum the penalties of ``terms``; each term gets the inputs that it takes.

    Args:
        name: name of the algorithm.
        own: inputs that the algorithm takes itself.

    Raises:
        TypeError: neither the algorithm nor a term takes an input, or a needed input is missing.
    """
    if not (terms or inputs):
        return None
    takes = {key: type(term).__name__ for term in terms for key in term.inputs()}
    takes |= dict.fromkeys(own, name)
    for key in inputs:
        if key not in takes:
            near = nearest(key, takes)
            known = ", ".join(f"{key}= ({of})" for key, of in takes.items()) or "none"
            raise TypeError(
                f"{key}: {name}.backward has no such input. "
                + (f"Did you mean {near}=?" if near else f"It takes {known}.")
            )
    if not terms:
        return None
    found = [term.added(losses, inputs) for term in terms]
    values = [part.values for part in found]
    statistics = {key: value for part in found for key, value in part.statistics.items()}
    return PenaltyOutput(values[0] if len(values) == 1 else torch.stack(values).sum(0), statistics)


def term_statistics(added: PenaltyOutput) -> TermStatistics:
    """Detach the statistics of a micro-batch's penalties."""
    values = added.values.detach()
    return len(values), values.mean(), added.statistics


def merged(
    parts: Sequence[TermStatistics], statistics: Mapping[str, Tensor], whole: GlobalBatch
) -> dict[str, Tensor]:
    """Merge an algorithm's statistics with the terms' of all micro-batches.

    The objective includes the terms' means.
    """
    if not parts:
        return dict(statistics)
    shares = [count / whole.samples for count, _, _ in parts]

    def mean(values: Sequence[Tensor]) -> Tensor:
        if shares == [1]:
            return values[0]
        return torch.stack([v * s for v, s in zip(values, shares, strict=True)]).sum(0)

    keys = list(parts[0][2])
    means = [mean([own[key] for _, _, own in parts]) for key in keys]
    added, *means = whole.total([mean([value for _, value, _ in parts]), *means])
    return {
        **statistics,
        "objective": statistics.get("objective", statistics["loss"]) + added,
        **dict(zip(keys, means, strict=True)),
    }
