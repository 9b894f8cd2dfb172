"""Iterations whose weights on the way are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import not_compiled
from ..core.combine.seeded import Seeded
from ..core.declared_state import Group, PerParameter, Rows, RunValue
from ..distributed.sharding import refuse_sharded
from .anchored import Anchored, _inside


def _saved_steps(opt: Walk, group: Group) -> int:
    key = f"{opt.prefix}_turns"
    return int(group.get(key) or opt.splits) * opt.num_domains


_STEPS = Rows("inner steps", "its splits, and num_domains", _saved_steps)


def _zeros(opt: Walk, p: Tensor) -> Tensor:
    return p.new_zeros((opt.inner_steps(), *p.shape))


class Walk(Seeded, Anchored):
    """Keeps the change of the weights after each inner step: ``splits`` turns of a step on each
    domain. Others from the next iteration on, if ``splits`` changes."""

    num_domains: int
    splits: int
    turns = RunValue(0)  # splits of this iteration, or of the last one; 0: none has begun

    changes = PerParameter(
        "changes",
        "changes of the weights",
        rows=_STEPS,
        begin=lambda opt: {p: _zeros(opt, p) for p in opt._names},
        needed=_inside,
    )

    def inner_steps(self) -> int:
        return (self.turns if self.position else self.splits) * self.num_domains

    def order(self) -> list[int]:
        """Draw the domain of each inner step: in each turn, all domains in another order."""
        generator = self.generator_on(torch.device("cpu"))
        turns = [torch.randperm(self.num_domains, generator=generator) for _ in range(self.splits)]
        self._remember()
        drawn: list[int] = torch.cat(turns).tolist()
        return drawn

    @not_compiled
    def _prepare(self) -> None:
        super()._prepare()
        for p in self.kept:
            refuse_sharded(p, type(self).__name__, "of which it keeps rows for each step")

    @not_compiled
    @torch.no_grad()
    def _commit(self) -> None:
        if self.position == 0:
            self.turns = self.splits
            steps = self.inner_steps()
            self.changes = {p: rows for p, rows in self.changes.items() if len(rows) == steps}
        for p, start in self.kept.items():
            if p not in self.changes:
                self.changes[p] = _zeros(self, p)
            torch.sub(p, start, out=self.changes[p][self.position])
        super()._commit()
