"""Penalties that start late, as DomainBed's do."""

from __future__ import annotations

from typing import Any

from .base_state import renew
from .hyper import Setting, check_count, check_switch, check_weight
from .nesting import chain, innermost
from .optimizer import DomainOptimizer


class Annealed(DomainOptimizer):
    """A wrapper whose penalty gets its full weight at step ``anneal_steps``.

    At that step the wrapped optimizer starts anew if ``reset_base``: its moments are those of
    another objective.
    """

    penalty_weight: Setting[float] = Setting(check_weight)
    anneal_steps: Setting[int] = Setting(check_count)
    pre_anneal_weight: Setting[float] = Setting(check_weight)
    reset_base: Setting[bool] = Setting(check_switch)

    def _weight(self) -> float:
        return self.penalty_weight if self.steps >= self.anneal_steps else self.pre_anneal_weight

    def _prepare(self) -> None:
        if self.reset_base and self.anneal_steps and self.steps == self.anneal_steps:
            renew(innermost(self.base), tuple(f"{link.prefix}_" for link in chain(self)))

    def settings(self) -> dict[str, Any]:
        own = ("penalty_weight", "anneal_steps", "pre_anneal_weight", "reset_base")
        return {**super().settings(), **{name: getattr(self, name) for name in own}}
