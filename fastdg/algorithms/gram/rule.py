"""A weighting with a name, whose arguments are the algorithm's hyper-parameters."""

from __future__ import annotations

import inspect
from typing import ClassVar

from torch import Tensor

from ...core.hyper import Hyper, declared
from ...weightings.gram import GramWeighting
from ..gram_surgery import GramSurgery


class GramRule(GramSurgery):
    """`GramSurgery` with a ``rule`` of `fastdg.weightings`; a class declares what that takes.

    Schedulers may change it, and the state of the rule is in ``state_dict``. Statistics, and
    domains that a batch lacks (``absent=``), as in `GramSurgery`.
    """

    rule: ClassVar[type[GramWeighting]]
    weighting = normalize = None  # type: ignore[assignment]  # no arguments of these wrappers

    def _start(self) -> None:
        super()._start()
        self.weighting, self.normalize = self.rule(), False
        known = declared(type(self))
        names = inspect.signature(self.rule).parameters
        self._settings = [name for name in names if isinstance(known.get(name), Hyper)]

    def ask(self, gram: Tensor) -> Tensor:
        for name in self._settings:
            setattr(self.weighting, name, getattr(self, name))
        return super().ask(gram)
