"""Penalties that start late, as in DomainBed."""

from __future__ import annotations

from .base_state import renew
from .hyper import check_count, check_switch, check_weight, fixed, hyper
from .nesting import chain, innermost
from .optimizer import DomainOptimizer


class Annealed(DomainOptimizer):
    """A wrapper whose penalty gets its full weight at step ``anneal_steps``.

    At that step the wrapped optimizer starts anew if ``reset_base``: its moments belong to another
    objective.
    """

    lr_after_anneal: float | None = fixed(None, init=False)  # learning rate from that step on
    penalty_weight: float
    anneal_steps: int = hyper(500, check_count)
    pre_anneal_weight: float = hyper(1.0, check_weight)
    reset_base: bool = hyper(True, check_switch)

    @property
    def weight(self) -> float:
        """Weight of the penalty in this step."""
        return self.penalty_weight if self.steps >= self.anneal_steps else self.pre_anneal_weight

    def _prepare(self) -> None:
        if self.steps == self.anneal_steps:
            if self.anneal_steps:
                self.renew_base()
            if self.lr_after_anneal is not None:
                for group in self.param_groups:
                    group["lr"] = self.lr_after_anneal

    def renew_base(self) -> None:
        """Let the wrapped optimizer start anew, if ``reset_base``."""
        if self.reset_base:
            renew(innermost(self.base), tuple(f"{link.prefix}_" for link in chain(self)))
