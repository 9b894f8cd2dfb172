"""A weighting with a name, whose arguments are the algorithm's hyper-parameters."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar

from ...core.combine.weightings import Weighting
from ...core.hyper import Hyper, declared, fixed
from ...weightings.gram import GramWeighting
from ..gram_surgery import GramSurgery


class GramRule(GramSurgery):
    """`GramSurgery` with a ``rule`` of `fastdg.weightings`; a class declares the rule's arguments.

    Schedulers may change it, and the state of the rule is in ``state_dict``. Statistics, and
    domains that a batch lacks (``absent=``), as in `GramSurgery`.
    """

    rule: ClassVar[type[GramWeighting]]
    normalize: bool = fixed(False, init=False)
    if TYPE_CHECKING:
        weighting: Weighting = fixed(None, init=False)

    def _start(self) -> None:
        super()._start()
        self._rule = self.rule()
        known = declared(type(self))
        names = inspect.signature(self.rule).parameters
        self._settings = [name for name in names if isinstance(known.get(name), Hyper)]

    if not TYPE_CHECKING:

        @property
        def weighting(self) -> GramWeighting:
            """The rule, with the settings that there are now."""
            for name in self._settings:
                setattr(self._rule, name, getattr(self, name))
            return self._rule
