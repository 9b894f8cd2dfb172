"""Moving averages of a statistic of each parameter, by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import foreach_lerp_
from ..core.declared_state import DOMAINS, STEP_FIRST, PerParameter
from ..core.nesting import terms_of
from ..distributed.sharding import local
from ..domains import readable
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
            own = self.kept.get(parameters[name])
            if own is None:
                own = torch.zeros_like(value, requires_grad=False)
            elif own.shape != value.shape:
                D = value.shape[0]
                own = pad_rows(own[:D], D)
            found.append(own)
        return found

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
        for p, value in named:
            D = value.shape[0]
            own = kept.get(p)
            if own is None:
                own = kept[p] = torch.zeros_like(value)
            elif (rows := own.shape[0]) < D:
                own = kept[p] = pad_rows(own, D)
            elif rows > D:
                own = own[:D]
            moved.append(own)
        if not moved:
            return
        found = [*values.values()]
        every = readable(present) and all(present.tolist())
        foreach_lerp_(moved, found, rate if every else _row_rates(found, rate, present))


def _row_rates(values: Sequence[Tensor], rate: float, present: Tensor) -> list[Tensor]:
    """Return ``rate`` in the rows ``present`` of each of ``values``, 0 in the others."""
    rates = {dtype: rate * present.to(dtype) for dtype in {x.dtype for x in values}}
    made: dict[tuple[torch.dtype, int], Tensor] = {}  # by dtype and dimensions
    for x in values:
        if (kind := (x.dtype, x.dim())) not in made:
            made[kind] = rates[x.dtype][: len(x)].view(-1, *[1] * (x.dim() - 1))
    return [made[x.dtype, x.dim()] for x in values]


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
