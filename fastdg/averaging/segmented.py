"""An average of the weights of some segments of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.declared_state import PerParameter, Rows, RunValue
from ..warn import warn_user
from .averaged import WAY, Averaged, zeros
from .valley import RULES, Rule, Valley

_SEGMENTS = Rows(
    "segments",
    "the number of saved losses",
    lambda opt, group: len(group.get(f"{opt.prefix}_losses", ())),
)


def _none(opt: Segmented) -> dict[Tensor, Tensor]:
    return {p: zero.new_zeros((0, *zero.shape)) for p, zero in zeros(opt).items()}


class Segmented(Averaged):
    """The weights after every step join the mean of a segment. A rule decides which segments join
    the average."""

    n_converge: int
    n_tolerance: int
    tolerance_ratio: float
    rule: str  # in `RULES`

    segment = PerParameter("segment", "average of a segment", begin=zeros, way=WAY)
    pending = PerParameter("pending", "pending averages", rows=_SEGMENTS, begin=_none, way=WAY)
    average = PerParameter(
        "average",
        "average",
        begin=zeros,
        needed=lambda opt, group: group.get(f"{opt.prefix}_average_steps"),
        way=WAY,
    )
    # Steps of `segment`, of each of `pending`, and of `average`; lists are replaced, never changed
    segment_steps = RunValue(0)
    pending_steps = RunValue[list[int]]([])
    losses = RunValue[list[float]]([])  # at the end of each pending segment
    average_steps = RunValue(0)
    threshold = RunValue[float | None](None)  # of a valley
    early = RunValue(0)
    finished = RunValue(False)  # whether the valley has ended: the average changes no more

    _last_loss, _always_rose = -math.inf, False  # of a run that was not resumed

    def _warn_if_rising(self, loss: float) -> None:
        """Warn at the end of a valley if no loss was below the one before: an accuracy looks so."""
        first = self._last_loss == -math.inf and len(self.losses) <= 1 and not self.started
        self._always_rose = first or (self._always_rose and loss > self._last_loss)
        self._last_loss = loss
        if self.finished and self._always_rose:
            warn_user(
                "validation_loss: expected losses, which fall as the model gets better, got values "
                "that rose at every evaluation. Of an accuracy a pass 1 - a, or better the loss."
            )

    @property
    def started(self) -> bool:
        """Whether a valley was found."""
        return self.threshold is not None

    @property
    def _rule(self) -> Rule:
        return RULES[self.rule]

    def loss_of_ranks(self, name: str, value: Any) -> float:
        """Average a number over the ranks.

        Raises:
            TypeError, ValueError: it is not a finite number, on this rank or another.
        """
        try:
            own = finite(name, value)
        except (TypeError, ValueError):
            self._ranks.mean(math.nan)  # the others wait for this rank
            raise
        return finite(f"{name}: on some rank", self._ranks.mean(own))

    def _add(self) -> None:
        if not self.finished:
            self._join(self.segment, self.segment_steps)
            self.segment_steps += 1

    def _end_segment(self, loss: float) -> None:
        """Add the current segment with its loss to the pending ones.

        Raises:
            RuntimeError: the segment has no steps.
        """
        if not self.segment_steps:
            raise RuntimeError(
                f"{type(self).__name__}.evaluate: expected a step since the last evaluation, got "
                "none. Call opt.step() before."
            )
        for p, segment in self.segment.items():
            row = segment.unsqueeze(0)
            before = self.pending.get(p)
            if before is None:  # a new parameter had this value in earlier segments too
                before = row.expand(len(self.losses), *segment.shape)
            self.pending[p] = torch.cat([before, row])
        self.losses = [*self.losses, loss]
        self.pending_steps = [*self.pending_steps, self.segment_steps]
        self.segment_steps = 0

    def _apply_rule(self) -> None:
        """Apply the rule to the pending segments, and take its verdict over."""
        settings = self.n_converge, self.n_tolerance, self.tolerance_ratio
        verdict = self._rule.after(Valley(self.losses, self.threshold, self.early, *settings))
        self.threshold, self.early = verdict.threshold, verdict.early
        if verdict.starts is not None:
            for p, pending in self.pending.items():
                self.average[p] = pending[verdict.starts].clone()
        self._join_pending(verdict.joins)
        self._drop(verdict.drops)
        self.finished = verdict.ends

    def _join_pending(self, places: Sequence[int]) -> None:
        """Add the pending segments at these places to the average."""
        if not places:
            return
        counts = [self._weight(self.pending_steps[place]) for place in places]
        before = self.average_steps
        for p, pending in self.pending.items():
            parts = [pending[place] for place in places]
            own = self.average.get(p)
            if own is None or not before:
                self.average[p] = mean(parts, counts)
            else:
                own.copy_(mean([own, *parts], [before, *counts]))
        self.average_steps = before + sum(counts)

    def _drop(self, count: int) -> None:
        """Remove the first ``count`` pending segments."""
        kept = self.pending
        if not count:
            return
        for p in kept:
            kept[p] = kept[p][count:].clone()
        self.losses = self.losses[count:]
        self.pending_steps = self.pending_steps[count:]

    def _weight(self, steps: int) -> int:
        """Return the weight of a segment of ``steps`` steps."""
        return steps if self._rule.by_steps else min(steps, 1)

    def _mean(self) -> tuple[dict[Tensor, Tensor], int]:
        """Return the current averaged weights, and their number of steps (or segments).

        Raises:
            RuntimeError: no step was made yet.
        """
        losses, waiting, threshold = self.losses, self.pending_steps, self.threshold
        started, segment = self.started, self.segment_steps
        if not self._rule.open and (started or waiting):
            segment = 0
        places: Sequence[int] = range(len(waiting))[-1:]  # the last one, without a valley
        if threshold is not None:
            places = self._rule.rest(losses, threshold)
        elif segment:
            places = ()
        ends = [*(waiting[place] for place in places), segment]
        counts = [self.average_steps, *map(self._weight, ends)]
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
        for p, last in self.segment.items():
            pending = self.pending.get(p)
            rows = [last if pending is None else pending[place] for place in places]
            parts = [self.average.get(p, last), *rows, last]
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
