"""Tell a user whose steps see one domain each that the algorithm changes nothing."""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any

import torch
from torch import Tensor

from ..domains import readable, tracing

FIRST = 20  # steps of one domain from the start of a run
LATER = 100  # such steps in a row in a run that has also seen several domains in a step


class OneDomain:
    """Which domains the steps of an algorithm see that compares domains.

    With one domain in a step its penalty is 0 and nothing conflicts: the step is one of plain
    training. Two habits lead there: batches of one domain each, and a ``backward`` for each domain
    without ``final=False``. A step of one domain now and then (a small or ragged batch) is no
    habit.
    """

    def __init__(self) -> None:
        self.row, self.mixed, self.told = 0, False, False
        self.calls: list[int] = []  # the one domain of each `backward` since the last step
        self.waiting: deque[tuple[Tensor, Any, bool]] = deque()

    def watch(self, opt: Any, again: bool, stacklevel: int = 3) -> None:
        """Look at a final `backward`, and warn its caller, once.

        Counts on another device than the CPU are looked at by a later call, once their copies are
        there: nothing waits.

        Args:
            opt: the wrapper whose it was.
            again: whether ``.grad`` held the gradient of an earlier one for the same step.
            stacklevel: of the caller of `backward`, from here.
        """
        wanted = opt.compares and opt.num_domains != 1 and getattr(opt, "penalty_weight", 1) > 0
        if self.told or not wanted or opt._ranks.rank or tracing():
            return
        self.waiting.append((*_copied(opt.statistics["domain_count"]), again))
        while self.waiting and _there(self.waiting[0][1]):
            count, _, again = self.waiting.popleft()
            problem = self._note([d for d, n in enumerate(count.tolist()) if n], again)
            if problem is not None:
                self.told = True
                name = type(opt).__name__
                warnings.warn(
                    f"domains: {name} compares the domains of a step, {problem}",
                    UserWarning,
                    stacklevel=stacklevel,
                )
                return

    def _note(self, domains: list[int], again: bool) -> str | None:
        if len(domains) > 1:
            self.row, self.mixed, self.calls = 0, True, []
            return None
        if not again:
            self.row, self.calls = self.row + 1, []
        elif not self.calls:  # after one of several domains in the same step
            return None
        self.calls += domains
        if not self.mixed and len(set(self.calls)) > 1:
            return (
                f"but the {len(self.calls)} backward calls of this one saw one domain each, got "
                f"domains {', '.join(map(str, self.calls))}. Their sum is the gradient of plain "
                "training. Pass final=False to all backward calls of a step but the last, or mix "
                "the domains in each batch."
            )
        if self.row >= (LATER if self.mixed else FIRST):
            return (
                f"but {self.row} of the last {self.row} steps saw one domain only, and were plain "
                "training. Mix the domains in each batch, or run a batch of each domain in every "
                "step, with backward(losses, domains, final=False) for all but the last."
            )
        return None


def _copied(count: Tensor) -> tuple[Tensor, Any]:
    """``count`` on the CPU, and the event after which it is there; None: it is there now."""
    if readable(count):
        return count.clone(), None
    copy = count.to("cpu", non_blocking=True)
    event = torch.Event(count.device)
    event.record()
    return copy, event


def _there(event: Any) -> bool:
    return event is None or event.query()
