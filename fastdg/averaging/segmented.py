"""An average of the weights of some segments of training."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from torch import Tensor

from ..core.declared_state import PerParameter, Rows, RunValue
from ..warn import warn_user
from .averaged import WAY, Averaged, zeros
from .averages import Segments, finite

_SEGMENTS = Rows(
    "segments",
    "the number of saved losses",
    lambda opt, group: len(group.get(f"{opt.prefix}_losses", ())),
)


def _none(opt: Segmented) -> dict[Tensor, Tensor]:
    return {p: zero.new_zeros((0, *zero.shape)) for p, zero in zeros(opt).items()}


class Segmented(Averaged):
    """The weights after every step join the mean of a segment. The class decides which segments
    join the average, see `Segments`."""

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

    @abstractmethod
    def _segments(self) -> Segments:
        """Return the segments of the average."""

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

    def _mean(self) -> tuple[dict[Tensor, Tensor], int]:
        return self._segments().mean()

    def _add(self) -> None:
        if not self.finished:
            self._join(self.segment, self.segment_steps)
            self.segment_steps += 1
