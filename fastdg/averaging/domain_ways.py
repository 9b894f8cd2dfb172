"""Iterations in which each domain goes its own way from the same weights."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import not_compiled
from ..core.batch import Batch
from ..core.closures import check_same
from ..core.declared_state import DOMAINS, PerParameter
from ..core.nesting import chain
from ..distributed.sharding import refuse_sharded
from .anchored import Anchored, _inside

ORDER = (
    "domains: {} takes domain_steps={} steps on each domain in turn, from 0 to D - 1, and is at "
    "domain {}"
)


class _Flat(PerParameter):
    """A row of numbers for each domain, whatever the parameter's shape."""

    def fits(self, p: Tensor, tensor: Tensor) -> bool:
        return tensor.dim() == 2


def _known(opt: DomainWays) -> dict[Tensor, Tensor]:
    """Room for the states of the optimizer inside, where it has made one already."""
    entries = {p: opt._entry(p) for p in opt._names if opt.state.get(p)}
    return {
        p: no_states(opt.num_domains, tensors)
        for p, entry in entries.items()
        if (tensors := [entry[name] for name in tensors_of(p, entry)])
    }


def _past_first(opt: DomainWays, group: Any) -> bool:
    """Whether the first domain has gone its way: before, no way is kept."""
    steps = group.get(f"{opt.prefix}_domain_steps", opt.domain_steps)
    return bool(_inside(opt, group)) and group.get(f"{opt.prefix}_position", 0) >= steps


class DomainWays(Anchored):
    """Keeps the way that each domain has gone in this iteration, and the state that the optimizer
    inside has for each domain, which goes on from iteration to iteration.

    A domain takes ``domain_steps`` steps from the weights that the iteration began with, and the
    weights go back there; after the last domain, `meta_step`. The state of the optimizer inside is
    exchanged before a step: the present state belongs to the domain that has stepped last. A domain
    that has not stepped begins with the state that was there before all of them.
    """

    num_domains: int
    domain_steps: int

    ways = PerParameter(
        "ways",
        "ways that the domains have gone",
        rows=DOMAINS,
        begin=lambda opt: {p: p.new_zeros((opt.num_domains, *p.shape)) for p in opt._names},
        needed=lambda opt, group: _past_first(opt, group),
    )
    # One tensor of the optimizer's after the other, which may have another shape than the parameter
    states = _Flat(
        "states",
        "states of the optimizer for each domain",
        rows=DOMAINS,
        begin=_known,
        needed=lambda opt, group: False,
    )
    # Whether a domain has a state, and the numbers in it
    numbers = _Flat(
        "numbers",
        "numbers of the optimizer for each domain",
        rows=DOMAINS,
        begin=lambda opt: {
            p: no_numbers(opt.num_domains, numbers_of(p, opt._entry(p)))
            for p in opt._names
            if opt.state.get(p)
        },
        needed=lambda opt, group: False,
    )

    def inner_steps(self) -> int:
        return self.num_domains * self.domain_steps

    def order(self) -> list[int]:
        return [d for d in range(self.num_domains) for _ in range(self.domain_steps)]

    def _start(self) -> None:
        super()._start()
        # The inner optimizer's state before any domain has stepped
        self._born: dict[Tensor, dict[str, Any]] = {
            p: copy.deepcopy(self._entry(p)) for p in self.state
        }
        self._present: dict[Tensor, dict[str, Any]] = {}  # its entries before this step

    @abstractmethod
    def combined(self, gram: Tensor) -> Tensor:
        """Weights of the ways ``[D]``, given their Gram matrix ``[D, D]``."""

    @property
    def _domain(self) -> int:
        return self.position // self.domain_steps

    # -- batches --

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None, **own: Any) -> Batch:
        batch: Any = super()._batch(losses, domains, terms, **own)
        problem = ORDER.format(type(self).__name__, self.domain_steps, self._domain)
        advice = "Pass its samples, or call opt.step(closure), which runs the domains in order."
        check_same(batch.domain.reshape(1), self._domain, problem, advice)
        return batch

    # -- steps --

    @not_compiled
    def _prepare(self) -> None:
        super()._prepare()
        self._present = {}
        for p in self._stepping_parameters():
            self._present[p] = dict(self.state[p])
            self._bring(p, self._domain)

    def _undo(self) -> None:
        super()._undo()
        for p, entry in self._present.items():
            self.state[p].clear()
            self.state[p].update(entry)
        self._present = {}

    @not_compiled
    def _commit(self) -> None:
        d = self._domain
        for p in self._present:  # none after a step that was skipped
            self._take(p, d)
        self._present = {}
        if (self.position + 1) % self.domain_steps == 0:
            self._end_way(d)
        super()._commit()

    @torch.no_grad()
    def _end_way(self, d: int) -> None:
        """Keep the way of a domain, and go back to where it began."""
        for p, start in self.kept.items():
            if p not in self.ways:
                self.ways[p] = p.new_zeros((self.num_domains, *p.shape))
            torch.sub(p, start, out=self.ways[p][d])
            p.copy_(start)

    # -- a state of the optimizer inside for each domain --

    def _stepping_parameters(self) -> Iterator[Tensor]:
        for p in self._names:
            if p.grad is not None:
                refuse_sharded(p, type(self).__name__, "of which it keeps rows for each domain")
                yield p

    def _entry(self, p: Tensor) -> dict[str, Any]:
        """Return a parameter's entry of the optimizer inside, without the keys of wrappers."""
        prefixes = tuple(f"{link.prefix}_" for link in chain(self))
        return {k: v for k, v in self.state[p].items() if not str(k).startswith(prefixes)}

    def _bring(self, p: Tensor, d: int) -> None:
        """Let the optimizer inside have the domain's state."""
        entry, live = self._entry(p), self.state[p]
        if p not in self.numbers:
            self._born[p] = copy.deepcopy(entry)
        if p not in self.numbers or not self.numbers[p][d, 0]:
            live.clear()
            live.update(copy.deepcopy(self._born.get(p, {})))
            return
        self.numbers[p] = self.numbers[p].cpu()  # after a load
        tensors = tensors_of(p, entry)
        for name, row in zip(tensors, self._rows(p, d, [entry[k] for k in tensors]), strict=True):
            live[name] = row
        for name, value in zip(numbers_of(p, entry), self.numbers[p][d, 1:], strict=True):
            before = entry[name]
            live[name] = (
                value.to(before.device, before.dtype, copy=True)
                if isinstance(before, Tensor)
                else type(before)(value)
            )

    def _take(self, p: Tensor, d: int) -> None:
        """Keep the state that the optimizer inside has now as the domain's."""
        entry, live = self._entry(p), self.state[p]
        numbers = numbers_of(p, entry)
        tensors = {name: entry[name] for name in tensors_of(p, entry)}
        if p not in self.numbers:
            check_entry(entry, tensors, type(self).__name__)
            self.numbers[p] = no_numbers(self.num_domains, numbers)
        if tensors and p not in self.states:
            self.states[p] = no_states(self.num_domains, [*tensors.values()])
        self.numbers[p][d] = torch.tensor(
            [1.0, *(float(entry[name]) for name in numbers)], dtype=torch.float64
        )
        for (name, x), row in zip(
            tensors.items(), self._rows(p, d, [*tensors.values()]), strict=True
        ):
            if x.data_ptr() != row.data_ptr():
                row.copy_(x)
            live[name] = row

    def _rows(self, p: Tensor, d: int, like: Sequence[Tensor]) -> Sequence[Tensor]:
        """A domain's part of `states`, as tensors of these shapes."""
        if p not in self.states:
            return ()
        parts = self.states[p][d].split([x.numel() for x in like])
        return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def check_entry(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    """Raise TypeError unless a domain's state is numbers, and tensors of one dtype."""
    plain = (Tensor, int, float, str, type(None))
    kinds = {str(x.dtype) for x in tensors.values()}
    kinds = kinds if len(kinds) > 1 else set()
    kinds |= {f"a {type(x).__name__} ({k})" for k, x in entry.items() if not isinstance(x, plain)}
    if kinds:
        raise TypeError(
            f"base: for each domain {name} keeps numbers and tensors of one dtype, got "
            f"{', '.join(sorted(kinds))} in the optimizer's state. Use another optimizer, as Adam."
        )


def no_states(domains: int, tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_zeros((domains, sum(x.numel() for x in tensors)))


def no_numbers(domains: int, names: Sequence[str]) -> Tensor:
    return torch.zeros((domains, 1 + len(names)), dtype=torch.float64)


def numbers_of(p: Tensor, entry: dict[str, Any]) -> list[str]:
    """Names of the numbers in an optimizer's entry for a parameter, counters for example."""
    return sorted(
        name
        for name, x in entry.items()
        if isinstance(x, (int, float))
        or (isinstance(x, Tensor) and x.dim() == 0 and (p.dim() > 0 or name == "step"))
    )


def tensors_of(p: Tensor, entry: dict[str, Any]) -> list[str]:
    """Names of the other tensors in an optimizer's entry for a parameter."""
    numbers = numbers_of(p, entry)
    return sorted(k for k, x in entry.items() if isinstance(x, Tensor) and k not in numbers)
