"""Averages of weights for `SWAD`: over a segment of training, pending segments, a valley."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..warn import warn_user
from .valley import Rule, Valley


class Segments:
    """The segments of a run, stored in the wrapper's tensors and values.

    Args:
        opt: the wrapper, see `Averaged`.
        rule: decides which segments join the average, and with which weight.
    """

    def __init__(self, opt: Any, rule: Rule) -> None:
        self.opt, self.rule = opt, rule

    def push(self, loss: float) -> None:
        """Add the current segment with its loss to the pending ones.

        Raises:
            RuntimeError: the segment has no steps.
        """
        opt = self.opt
        if not opt.segment_steps:
            raise RuntimeError(
                f"{type(opt).__name__}.evaluate: expected a step since the last evaluation, got "
                "none. Call opt.step() before."
            )
        for p, segment in opt.segment.items():
            row = segment.unsqueeze(0)
            before = opt.pending.get(p)
            if before is None:  # a new parameter had this value in earlier segments too
                before = row.expand(len(opt.losses), *segment.shape)
            opt.pending[p] = torch.cat([before, row])
        opt.losses = [*opt.losses, loss]
        opt.pending_steps = [*opt.pending_steps, opt.segment_steps]
        opt.segment_steps = 0

    def apply_rule(self, n_converge: int, n_tolerance: int, tolerance_ratio: float) -> None:
        """Apply the rule to the pending segments, and take its verdict over."""
        opt = self.opt
        settings = n_converge, n_tolerance, tolerance_ratio
        verdict = self.rule.after(Valley(opt.losses, opt.threshold, opt.early, *settings))
        opt.threshold, opt.early = verdict.threshold, verdict.early
        if verdict.starts is not None:
            for p, pending in opt.pending.items():
                opt.average[p] = pending[verdict.starts].clone()
        self._join(verdict.joins)
        self._drop(verdict.drops)
        opt.finished = verdict.ends

    def _join(self, places: Sequence[int]) -> None:
        """Add the pending segments at these places to the average."""
        if not places:
            return
        opt = self.opt
        counts = [self._weight(opt.pending_steps[place]) for place in places]
        before = opt.average_steps
        for p, pending in opt.pending.items():
            parts = [pending[place] for place in places]
            own = opt.average.get(p)
            if own is None or not before:
                opt.average[p] = mean(parts, counts)
            else:
                own.copy_(mean([own, *parts], [before, *counts]))
        opt.average_steps = before + sum(counts)

    def _drop(self, count: int) -> None:
        """Remove the first ``count`` pending segments."""
        opt, kept = self.opt, self.opt.pending
        if not count:
            return
        for p in kept:
            kept[p] = kept[p][count:].clone()
        opt.losses = opt.losses[count:]
        opt.pending_steps = opt.pending_steps[count:]

    def _weight(self, steps: int) -> int:
        """Return the weight of a segment of ``steps`` steps."""
        return steps if self.rule.by_steps else min(steps, 1)

    def mean(self) -> tuple[dict[Tensor, Tensor], int]:
        """Return the current averaged weights, and their number of steps (or segments).

        Raises:
            RuntimeError: no step was made yet.
        """
        opt = self.opt
        losses, waiting = opt.losses, opt.pending_steps
        started = opt.threshold is not None
        segment = opt.segment_steps
        if not self.rule.open and (started or waiting):
            segment = 0
        places: Sequence[int] = range(len(waiting))[-1:]  # the last one, without a valley
        if started:
            places = self.rule.rest(losses, opt.threshold)
        elif segment:
            places = ()
        ends = [*(waiting[place] for place in places), segment]
        counts = [opt.average_steps, *map(self._weight, ends)]
        if not (sum(counts) or started):
            raise RuntimeError(
                "SWAD: there is no average before the first step. Call opt.step() before."
            )
        if not (losses or started):
            warn_user(
                "SWAD: opt.evaluate(validation_loss) was never called, so there is no valley, and "
                f"the average covers all {segment} steps. Call it after each validation.",
            )
        if not sum(counts):
            counts[0] = 1  # no segment has joined the first one
        found: dict[Tensor, Tensor] = {}
        for p, last in opt.segment.items():
            pending = opt.pending.get(p)
            rows = [last if pending is None else pending[place] for place in places]
            parts = [opt.average.get(p, last), *rows, last]
            used = [(part, n) for part, n in zip(parts, counts, strict=True) if n]
            found[p] = mean(*zip(*used, strict=True))
        return found, sum(counts)


def mean(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Average means over ``counts`` steps each."""
    total = sum(counts)
    result = parts[0] * (counts[0] / total)
    for part, count in zip(parts[1:], counts[1:], strict=True):
        result.add_(part, alpha=count / total)
    return result


def finite(name: str, value: Any) -> float:
    """Convert ``value``, a number or a tensor with one entry, to a float.

    Raises:
        TypeError, ValueError: it is not a finite number.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name}: expected one number, got a tensor {list(value.shape)}.")
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a finite number, got {type(value).__name__}.") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}.")
    return number
