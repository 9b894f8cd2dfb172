"""SWAD's two rules, which find the segments in a valley of the validation loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Valley(NamedTuple):
    """Input of a rule.

    Attributes:
        losses: losses of the pending segments, oldest first.
        threshold: loss above which a segment counts against the valley; None before a valley.
        early: number of pending segments before the valley's first.
        n_converge, n_tolerance, tolerance_ratio: settings of `SWAD`.
    """

    losses: Sequence[float]
    threshold: float | None
    early: int
    n_converge: int
    n_tolerance: int
    tolerance_ratio: float

    def level(self, window: Sequence[float]) -> float:
        """Return the threshold of a valley that begins with these losses."""
        mean = sum(window) / len(window)
        return mean + self.tolerance_ratio * abs(mean)


class Verdict(NamedTuple):
    """Result of a rule after an evaluation.

    Attributes:
        threshold, early: new values of `Valley`.
        starts: place of the segment that the average starts as a copy of, with weight 0.
        joins: places of the segments that join the average, once for each time.
        drops: number of pending segments to remove, oldest first.
        ends: whether the valley has ended.
    """

    threshold: float | None
    early: int = 0
    starts: int | None = None
    joins: Sequence[int] = ()
    drops: int = 0
    ends: bool = False


class Rule(NamedTuple):
    """One reading of SWAD.

    Attributes:
        by_steps: whether a segment's weight is its number of steps; otherwise all are equal.
        after: called after each evaluation, when the newest segment is the last pending one.
        rest: losses of the pending segments and the threshold -> places of the segments that join
            if training stops here, in a valley.
        open: whether the steps since the last evaluation join then too.
    """

    by_steps: bool
    after: Callable[[Valley], Verdict]
    rest: Callable[[Sequence[float], float], Sequence[int]]
    open: bool


def _after_by_the_paper(valley: Valley) -> Verdict:
    losses, patience, threshold = valley.losses, valley.n_tolerance, valley.threshold
    if threshold is None:
        if len(losses) < valley.n_converge:
            return Verdict(None)
        if losses[0] > min(losses):
            return Verdict(None, drops=len(losses) - (valley.n_converge - 1))
        threshold = valley.level(losses)
    elif len(losses) >= patience and min(losses[-patience:]) > threshold:
        within = range(len(losses) - patience)
        return Verdict(threshold, joins=within, drops=len(losses), ends=True)
    ready = max(0, len(losses) - (patience - 1))
    return Verdict(threshold, joins=range(ready), drops=ready)


def _after_by_the_code(valley: Valley) -> Verdict:
    losses, threshold = valley.losses, valley.threshold
    # The authors' code has two queues: before a valley, the longer one counts; in it, the smoothing
    held = valley.n_tolerance
    if threshold is None:
        held = max(held, valley.n_converge)
    drops = max(0, len(losses) - held)
    recent = max(0, len(losses) - valley.n_tolerance)  # where the smoothing begins
    if threshold is None:
        first = len(losses) - valley.n_converge
        if first < 0 or losses[first] > min(losses[first:]):
            return Verdict(None, drops=drops)
        threshold = valley.level(losses[first:])
        ahead = valley.n_tolerance - valley.n_converge
        if ahead <= 0:
            joins: Sequence[int] = range(first + 1, first + 1 - ahead)
        else:
            before = range(recent, min(recent + ahead + 1, len(losses)))
            above = [place for place in before if losses[place] > threshold]
            # The authors' code skips the first one within, as the average starts as its copy
            joins = range((above[-1] + 1 if above else recent) + 1, before.stop)
        return Verdict(threshold, max(0, first - recent), first, joins, recent)
    early = valley.early - drops
    if early > 0:
        return Verdict(threshold, early, drops=drops)
    if min(losses[recent:]) > threshold:
        return Verdict(threshold, drops=len(losses), ends=True)
    return Verdict(threshold, joins=[recent], drops=drops)


def _rest_by_the_code(losses: Sequence[float], threshold: float) -> Sequence[int]:
    last = 0  # the oldest has joined already
    while last + 1 < len(losses) and min(losses[last + 1 :]) <= threshold:
        last += 1
    return range(1, last + 1)


RULES = {
    "paper": Rule(True, _after_by_the_paper, lambda losses, threshold: range(len(losses)), True),
    "code": Rule(False, _after_by_the_code, _rest_by_the_code, False),
}
