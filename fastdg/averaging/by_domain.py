"""Moving averages of a statistic of each parameter, by domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._torch import foreach_lerp_
from ..core.declared_state import DOMAINS, STEP_FIRST, PerParameter
from ..core.nesting import terms_of
from ..distributed.sharding import local
from ..dtypes import to_statistics_dtype
from ..selection import select
from ..statistics.moments import pad_rows
from ..warn import warn_user

WAY = (
    "give num_domains= (and params=, unless the head is the optimizer's last layer), or "
    f"{STEP_FIRST}"
)


class DomainAverages(PerParameter):
    """Declares averages ``[D, *]`` for the parameters in ``params``: ``opt.<name>`` is `Averages`.

    Arguments as in `PerParameter`.
    """

    def __init__(self, key: str, what: str, **more: Any) -> None:
        super().__init__(key, what, rows=DOMAINS, begin=_zeros, **{"way": WAY, **more})

    def begin(self, opt: Any) -> dict[Tensor, Tensor]:
        return super().begin(opt) if self.needed(opt, opt.param_groups[0]) else {}

    def __get__(self, opt: Any, owner: type) -> Any:
        return self if opt is None else Averages(opt, self)


class Averages:
    """Averages of one wrapper. A new domain begins with zeros."""

    def __init__(self, opt: Any, declared: DomainAverages) -> None:
        self.opt, self.declared, self.kept = opt, declared, opt._own_state[declared.key]

    def of(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the current averages of these statistics ``[D, *]``, for their D domains."""
        found, parameters = [], self.opt.tape.names
        for name, value in values.items():
            own = self._like(parameters[name], value)
            if own is None:
                own = torch.zeros_like(value, requires_grad=False)
            elif own.shape != value.shape:
                D = value.shape[0]
                own = pad_rows(own[:D], D)
            found.append(own)
        return found

    def _like(self, p: Tensor, value: Tensor) -> Tensor | None:
        """Return the averages of a parameter, in the dtype of ``value``: a state may come from a
        run in another one."""
        own = self.kept.get(p)
        if own is not None and own.dtype is not value.dtype:
            own = self.kept[p] = own.to(value.dtype)
        return own

    def move(self, values: Mapping[str, Tensor], rate: float, present: Tensor) -> None:
        """Move the averages of the domains that are ``present`` by ``rate`` towards ``values``."""
        opt, kept, parameters = self.opt, self.kept, self.opt.tape.names
        named = [(parameters[name], value) for name, value in values.items()]
        if opt._resumed and kept and (new := [p for p, _ in named if p not in kept]):
            more = f" and of {len(new) - 1} more" if new[1:] else ""
            warn_user(
                f"state_dict: it has no {type(opt).__name__} {self.declared.what} of "
                f"{opt._names[new[0]]}{more}, so this starts from 0. Pass the params= of the saved "
                f"run, got {opt.params!r}.",
            )
        if opt.steps == 1:  # before the first forward, the parameters were guessed
            for p in kept.keys() - dict(named).keys():
                del kept[p]
                opt.state[p].pop(f"{opt.prefix}_{self.declared.key}", None)
        moved: list[Tensor] = []
        weights: list[Tensor] = []
        rates = {dtype: rate * present.to(dtype) for dtype in {x.dtype for x in values.values()}}
        made: dict[tuple[torch.dtype, int], Tensor] = {}  # weights by dtype and dimensions
        for p, value in named:
            D, kind = value.shape[0], (value.dtype, value.dim())
            own = self._like(p, value)
            if own is None:
                own = kept[p] = torch.zeros_like(value)
            elif (rows := own.shape[0]) < D:
                own = kept[p] = pad_rows(own, D)
            elif rows > D:
                own = own[:D]
            moved.append(own)
            if kind not in made:
                made[kind] = rates[value.dtype][:D].view(-1, *[1] * (value.dim() - 1))
            weights.append(made[kind])
        if moved:
            foreach_lerp_(moved, [*values.values()], weights)


def _zeros(opt: Any) -> dict[Tensor, Tensor]:
    """Return averages of a new run, for the parameters in ``params`` as known before a forward."""
    D = opt.num_domains
    if D is None:
        return {}
    terms = {p for term in terms_of(opt) for m in term.modules() for p in m.parameters()}
    named = {name: p for p, name in opt._names.items() if p not in terms}
    chosen = select(opt.params, named)
    found = [p for name, p in named.items() if chosen(name, p)]
    if opt.params == "head":  # the last weight, and its bias
        alone = len(found) < 2 or found[-1].dim() != 1 or found[-2].shape[:1] != found[-1].shape
        found = found[-1:] if alone else found[-2:]
    return {p: to_statistics_dtype(local(p.detach())).new_zeros((D, *p.shape)) for p in found}
