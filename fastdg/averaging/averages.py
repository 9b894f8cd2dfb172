"""The averages of `SWAD`: of a segment of training, of segments that wait, of a valley."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checkpoint import Kept
from ..warn import warn_user
from .valley import Rule, Valley

# What the first group holds before the first step. Lists in it are replaced, never changed
FRESH: dict[str, Any] = {
    "segment_steps": 0,
    "pending_steps": [],
    "losses": [],
    "average_steps": 0,
    "threshold": None,
    "early": 0,
    "finished": False,
}


class Segments:
    """The segments of a run, in the wrapper's tensors and in its first group.

    Args:
        group: it.
        kept: ``segment``, the mean of the steps since the last evaluation; ``pending``, a row for
            each segment that waits; ``average``, the valley's mean so far.
        rule: which segments join that, and with which weight.
    """

    def __init__(self, group: dict[str, Any], kept: Kept, rule: Rule) -> None:
        self.group, self.kept, self.rule = group, kept, rule

    def push(self, loss: float) -> None:
        """The segment waits, with its loss."""
        group, kept = self.group, self.kept
        for p, segment in kept["segment"].items():
            row = segment.unsqueeze(0)
            before = kept["pending"].get(p)
            if before is None:  # a new one was what it is all the time
                before = row.expand(len(group["swad_losses"]), *segment.shape)
            kept["pending"][p] = torch.cat([before, row])
        group["swad_losses"] = [*group["swad_losses"], loss]
        group["swad_pending_steps"] = [*group["swad_pending_steps"], group["swad_segment_steps"]]
        group["swad_segment_steps"] = 0

    def settle(self, n_converge: int, n_tolerance: int, tolerance_ratio: float) -> None:
        """Let the rule decide about the segments that wait."""
        group, kept = self.group, self.kept
        losses, threshold, early = (group[f"swad_{k}"] for k in ("losses", "threshold", "early"))
        settings = n_converge, n_tolerance, tolerance_ratio
        verdict = self.rule.after(Valley(losses, threshold, early, *settings))
        group["swad_threshold"], group["swad_early"] = verdict.threshold, verdict.early
        if verdict.starts is not None:
            for p, pending in kept["pending"].items():
                kept["average"][p] = pending[verdict.starts].clone()
        self._join(verdict.joins)
        self._drop(verdict.drops)
        group["swad_finished"] = verdict.ends

    def _join(self, places: Sequence[int]) -> None:
        """The segments that wait at these places become part of the average."""
        if not places:
            return
        group, kept = self.group, self.kept
        counts = [self._weight(group["swad_pending_steps"][place]) for place in places]
        before = group["swad_average_steps"]
        for p, pending in kept["pending"].items():
            parts = [pending[place] for place in places]
            own = kept["average"].get(p)
            if own is None or not before:
                kept["average"][p] = mean(parts, counts)
            else:
                own.copy_(mean([own, *parts], [before, *counts]))
        group["swad_average_steps"] = before + sum(counts)

    def _drop(self, count: int) -> None:
        """The first so many segments do not wait on."""
        group, kept = self.group, self.kept["pending"]
        if not count:
            return
        for p in kept:
            kept[p] = kept[p][count:].clone()
        group["swad_losses"] = group["swad_losses"][count:]
        group["swad_pending_steps"] = group["swad_pending_steps"][count:]

    def _weight(self, steps: int) -> int:
        """The weight of a segment of so many steps."""
        return steps if self.rule.by_steps else min(steps, 1)

    def mean(self) -> tuple[dict[Tensor, Tensor], int]:
        """The averaged weights now, and of how many steps (or segments) they are the mean.

        Raises:
            RuntimeError: no step was made yet.
        """
        group, kept = self.group, self.kept
        losses, waiting = group["swad_losses"], group["swad_pending_steps"]
        started = group["swad_threshold"] is not None
        segment = group["swad_segment_steps"]
        if not self.rule.open and (started or waiting):
            segment = 0
        places: Sequence[int] = range(len(waiting))[-1:]  # without a valley the last one
        if started:
            places = self.rule.rest(losses, group["swad_threshold"])
        elif segment:
            places = ()
        ends = [*(waiting[place] for place in places), segment]
        counts = [group["swad_average_steps"], *map(self._weight, ends)]
        if not (sum(counts) or started):
            raise RuntimeError("SWAD: there is no average before the first step")
        if not (losses or started):
            warn_user(
                "SWAD: opt.evaluate(validation_loss) was never called, so there is no valley, and "
                f"the average is that of all {segment} steps from the first one on",
            )
        if not sum(counts):
            counts[0] = 1  # no segment has joined the one that the average started as
        found: dict[Tensor, Tensor] = {}
        for p, last in kept["segment"].items():
            pending = kept["pending"].get(p)
            rows = [last if pending is None else pending[place] for place in places]
            parts = [kept["average"].get(p, last), *rows, last]
            used = [(part, n) for part, n in zip(parts, counts, strict=True) if n]
            found[p] = mean(*zip(*used, strict=True))
        return found, sum(counts)


def mean(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The mean of means of so many steps each."""
    total = sum(counts)
    result = parts[0] * (counts[0] / total)
    for part, count in zip(parts[1:], counts[1:], strict=True):
        result.add_(part, alpha=count / total)
    return result


def finite(name: str, value: Any) -> float:
    """``value``, a number or a tensor with one entry, as a float.

    Raises:
        TypeError, ValueError: it is none, or not finite.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name}: expected one number, got a tensor {list(value.shape)}")
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a finite number, got {type(value).__name__}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number
