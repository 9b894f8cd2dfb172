"""Warn if the steps see one domain each, so that an algorithm is plain training."""

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
    """Watches the domains in the steps of an algorithm that compares domains.

    With one domain in a step the penalty is 0 and no gradients conflict: the step is plain
    training. Two mistakes lead there: batches of one domain each, and a ``backward`` for each
    domain without ``final=False``. An occasional step of one domain (a small or ragged batch) is
    no mistake.
    """

    def __init__(self) -> None:
        self.row, self.mixed, self.told = 0, False, False
        self.calls: list[int] = []  # domain of each `backward` since the last step
        self.waiting: deque[tuple[Tensor, Any, bool]] = deque()

    def watch(self, opt: Any, again: bool, stacklevel: int = 3) -> None:
        """Count the domains of a final `backward`, and warn its caller once.

        A later call reads counts on another device than the CPU, when their copies have arrived:
        nothing waits.

        Args:
            opt: wrapper of the `backward`.
            again: whether ``.grad`` held the gradient of an earlier `backward` of the same step.
            stacklevel: of the caller of `backward`, from here.
        """
        wanted = opt.compares and opt.num_domains != 1 and getattr(opt, "penalty_weight", 1) > 0
        if self.told or not wanted or tracing() or not (opt._ranks.alone or opt._ranks.rank == 0):
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
        elif not self.calls:  # an earlier backward of this step saw several domains
            return None
        self.calls += domains
        if not self.mixed and len(set(self.calls)) > 1:
            return (
                f"but the {len(self.calls)} backward calls of this step saw one domain each, got "
                f"domains {', '.join(map(str, self.calls))}. Their sum is the gradient of plain "
                "training. Pass final=False to all backward calls of a step except the last, or "
                "mix the domains in each batch."
            )
        if self.row >= (LATER if self.mixed else FIRST):
            return (
                f"but each of the last {self.row} steps saw one domain only and was plain "
                "training. Mix the domains in each batch, or run a batch of each domain in every "
                "step, with backward(losses, domains, final=False) for all except the last."
            )
        return None


def _copied(count: Tensor) -> tuple[Tensor, Any]:
    """Return ``count`` on the CPU, and the event of its arrival or None."""
    if readable(count):
        return count, None
    copy = count.to("cpu", non_blocking=True)
    event = torch.Event(count.device)
    event.record()
    return copy, event


def _there(event: Any) -> bool:
    return event is None or event.query()
