"""Compute the domains' gradients of all parameters, from one mixed batch or micro-batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ... import ops
from ...domains import group_sums, to_device_async
from ...dtypes import to_statistics_dtype
from ...factors import Agreement, PerSampleGrad
from ...gradients.plain import gradients_of, unhooked
from ...gradients.scale import backward_scale, pow2_scale, unscaled
from ...statistics.small import Small
from ..batch import Batch

T = TypeVar("T")
ROWS_THERE = 1 << 25  # entries of the domains' gradients that wait for one launch on a GPU


@dataclass
class DomainBatch(Batch):
    """A micro-batch whose partition has the domains ``ids`` alone.

    Attributes:
        total: losses with the terms added ``[N]``, whose gradient is computed.
        ids: domains with samples if known without a wait, else all.
        extent: D.
    """

    total: Tensor
    ids: list[int]
    extent: int

    @property
    def alone(self) -> bool:
        """Whether all samples are known to be of one domain: autograd computes its gradient."""
        return len(self.ids) == 1


class Gradients(ABC):
    r"""The domains' gradients :math:`g_d = \frac1{n_d}\sum_{i\in d}\nabla\ell_i`, of E domains.

    Attributes:
        ids: the E domains; all D if it is not known which of them have samples.
        extent: D.
        count: samples of each domain ``[E]``.
        losses: sum of losses of each domain ``[E]``.
        samples: number of all samples.
        rest: tensor outside the optimizer -> gradient of the sum of all losses.
        sparse: parameters whose autograd gradient is sparse.
    """

    ids: list[int]
    extent: int
    count: Tensor
    losses: Tensor
    samples: int
    rest: dict[Tensor, Tensor]
    sparse: set[Tensor]

    @abstractmethod
    def agreement(
        self, weights: Tensor, threshold: float, steepness: float
    ) -> dict[Tensor, Agreement]:
        """Combine gradients where their signs agree; may be called once, instead of `gram`."""

    @abstractmethod
    def gram(self) -> Tensor:
        """Compute inner products over all parameters ``[E, E]``."""

    @abstractmethod
    def combined(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """Sum gradients times ``weights`` ``[E]``; may be called once, after `gram`."""

    @property
    def several(self) -> Tensor:
        """Whether more than one domain has samples, 0-dim bool."""
        return (self.count > 0).sum() > 1

    def weights(self, reduction: str) -> Tensor:
        """Return weights ``[E]`` of a mean or a sum over the domains with samples."""
        ones = (self.count > 0).to(self.losses.dtype)
        return ones / ones.sum().clamp(min=1) if reduction == "mean" else ones

    def scatter_rows(self, values: Tensor, fill: float) -> Tensor:
        """Scatter ``values [E, *]`` to their places among all domains ``[D, *]``."""
        return scatter_rows(values, self.ids, self.extent, fill)


def scatter_rows(values: Tensor, places: Sequence[int], extent: int, fill: float) -> Tensor:
    """Scatter ``values [E, *]`` to ``places`` of ``[extent, *]``; ``fill`` the others."""
    if len(places) == extent:
        return values
    every = values.new_full((extent, *values.shape[1:]), fill)
    index = torch.tensor(places, dtype=torch.int64, device="cpu")
    return every.index_copy_(0, to_device_async(index, values.device), values)


class Own(Gradients):
    """Gradients of this process's samples alone."""

    @abstractmethod
    def rows(self) -> dict[Tensor, list[Tensor]]:
        """Return the E gradients of each parameter."""

    @abstractmethod
    def feed(self, take: Callable[[Tensor, Sequence[Tensor]], None]) -> None:
        """Call ``take`` with each parameter and its E gradients, as soon as they are computed."""

    def gram(self) -> Tensor:
        self._groups = list(by_dtype(self.rows()))
        grams = [ops.gram(of_domains) for _, of_domains in self._groups]
        return grams[0] if len(grams) == 1 else torch.stack([g.double() for g in grams]).sum(0)

    def combined(self, weights: Tensor) -> dict[Tensor, Tensor]:
        made: dict[Tensor, Tensor] = {}
        for parameters, of_domains in self._groups:
            made.update(zip(parameters, ops.combine(of_domains, weights), strict=True))
        self._groups = []
        return made


class SingleBackward(Own):
    """Gradients of one mixed batch, from one backward that runs when they are requested."""

    def __init__(self, batch: DomainBatch) -> None:
        self.batch = batch
        self.ids, self.extent = batch.ids, batch.extent
        self.count, self.samples = batch.partition.count, batch.losses.shape[0]
        losses = to_statistics_dtype(batch.losses.detach())
        self.losses = group_sums(losses, batch.partition.domains, len(self.ids))
        self.rest = {}
        self.sparse = batch.tracked.sparse

    def rows(self) -> dict[Tensor, list[Tensor]]:
        parts, small = self.batch.partition, self._small()

        def rows(p: Tensor, factor: PerSampleGrad) -> list[Tensor]:
            if small.takes(p, factor):
                return []  # keeps its place among the parameters
            return list(factor.domain(parts).unbind())

        return self._each(rows) | _rows(small)

    def feed(self, take: Callable[[Tensor, Sequence[Tensor]], None]) -> None:
        self._each(lambda p, factor: take(p, factor.domain(self.batch.partition).unbind()))

    def agreement(
        self, weights: Tensor, threshold: float, steepness: float
    ) -> dict[Tensor, Agreement]:
        parts, small = self.batch.partition, self._small()
        made: dict[Tensor, Agreement] = {}
        waiting: dict[Tensor, list[Tensor]] = {}  # see `ROWS_THERE`
        entries = 0

        def combine(p: Tensor, factor: PerSampleGrad) -> None:
            nonlocal entries
            if small.takes(p, factor):
                return
            if weights.is_cpu or not factor.forms_domains(parts.num_domains):
                made[p] = factor.agreement(parts, weights, threshold, steepness)
                return
            rows = factor.domain(parts)
            waiting[p] = list(rows.unbind())
            entries += rows.numel()
            if entries > ROWS_THERE:
                made.update(_agreements(waiting, weights, threshold, steepness))
                waiting.clear()
                entries = 0

        self._each(combine)
        return made | _agreements(waiting | _rows(small), weights, threshold, steepness)

    def _small(self) -> Small[Tensor]:
        """Batch the means of small parameters: each call starts torch's threads several times,
        and waits for them if other processes keep the cores busy."""
        return Small(self.batch.partition, variance=False)

    def _each(self, compute: Callable[[Tensor, PerSampleGrad], T]) -> dict[Tensor, T]:
        """Run the backward, and ``compute`` each parameter's result as soon as possible."""
        chosen, rest = self.batch.tracked.chosen, self.batch.tracked.other_leaves
        made: dict[Tensor, T] = {}

        def use(name: str, factor: PerSampleGrad) -> None:
            with torch.no_grad():
                made[chosen[name]] = compute(chosen[name], factor)

        with unhooked(rest):
            grads = self.batch.tracked.collect(
                use, retain_graph=self.batch.retain_graph, extra=rest, scale=self.batch.scale
            )
        self.rest = {p: grad for p, grad in zip(rest, grads, strict=True) if grad is not None}
        return made


class AccumulatedGradients(Own):
    """Gradients of several micro-batches, each computed when the micro-batch is staged."""

    roots: Sequence[Tensor] = ()  # their graphs are freed

    def __init__(self) -> None:
        self.sums: dict[Tensor, dict[int, Tensor]] = {}  # sums of samples' gradients, by domain
        self.counts: dict[int, Tensor] = {}
        self.totals: dict[int, Tensor] = {}
        self.ids, self.extent, self.samples = [], 0, 0
        self.rest, self.sparse = {}, set()

    @staticmethod
    def of(earlier: Sequence[AccumulatedGradients], batch: DomainBatch) -> AccumulatedGradients:
        """Add a micro-batch to the accumulated gradients, new if there are none."""
        gathered = earlier[0] if earlier else AccumulatedGradients()
        gathered.add(batch)
        return gathered

    def add(self, batch: DomainBatch) -> None:
        """Add the gradients of a micro-batch, and free its graph."""
        swept = SingleBackward(batch)
        if batch.alone:
            self._add_alone(batch)
        else:
            for p, rows in swept.rows().items():
                for d, row, n in zip(swept.ids, rows, swept.count, strict=True):
                    self._add(p, d, row.mul_(n))
            for p, grad in swept.rest.items():
                self._add_rest(p, grad)
        self.sparse |= swept.sparse
        for d, n, loss in zip(swept.ids, swept.count, swept.losses, strict=True):
            self.counts[d] = n + self.counts.get(d, 0)
            self.totals[d] = loss + self.totals.get(d, 0)
        self.ids = sorted(self.counts)
        self.extent = max(self.extent, swept.extent)
        self.samples += swept.samples
        self.count = torch.stack([self.counts[d] for d in self.ids])
        self.losses = torch.stack([self.totals[d] for d in self.ids])

    def _add_alone(self, batch: DomainBatch) -> None:
        """Add one domain's gradient by autograd, which allows the model to mix samples."""
        tracked = batch.tracked
        chosen = {leaf: tracked.chosen[name] for name, leaf in tracked.leaves.items()}
        leaves = [*chosen, *tracked.other_leaves]
        under = backward_scale(batch.total, batch.scale)
        grad_scale = pow2_scale(batch.total) if under is None else under  # fp16 may not overflow
        weight = torch.ones_like(batch.total) * grad_scale
        grads = gradients_of(batch.total, leaves, weight, retain_graph=batch.retain_graph)
        for p, grad in zip(leaves, grads, strict=True):
            if grad is None:
                continue
            if p not in chosen:
                self._add_rest(p, unscaled(grad, grad_scale))
                continue
            if grad.layout != torch.strided:
                self.sparse.add(chosen[p])
                grad = grad.to_dense()
            self._add(chosen[p], batch.ids[0], unscaled(to_statistics_dtype(grad), grad_scale))

    def _add(self, p: Tensor, domain: int, grad: Tensor) -> None:
        sums = self.sums.setdefault(p, {})
        sums[domain] = sums[domain].add_(grad) if domain in sums else grad

    def _add_rest(self, p: Tensor, grad: Tensor) -> None:
        self.rest[p] = self.rest[p] + grad if p in self.rest else grad

    def rows(self) -> dict[Tensor, list[Tensor]]:
        sums, self.sums = self.sums, {}
        for by_domain in sums.values():
            like = next(iter(by_domain.values()))
            for d in self.ids:
                if d in by_domain:
                    by_domain[d] /= self.counts[d].clamp(min=1)
                else:  # the domain does not use it
                    by_domain[d] = torch.zeros_like(like)
        return {p: [by_domain[d] for d in self.ids] for p, by_domain in sums.items()}

    def feed(self, take: Callable[[Tensor, Sequence[Tensor]], None]) -> None:
        found = self.rows()
        for p in list(found):
            take(p, found.pop(p))

    def agreement(
        self, weights: Tensor, threshold: float, steepness: float
    ) -> dict[Tensor, Agreement]:
        return _agreements(self.rows(), weights, threshold, steepness)


def _rows(small: Small[Tensor]) -> dict[Tensor, list[Tensor]]:
    """Return the E gradients of each small parameter."""
    return {p: list(mean.unbind()) for p, (mean, _) in small.results().items()}


def _agreements(
    rows: Mapping[Tensor, Sequence[Tensor]], weights: Tensor, threshold: float, steepness: float
) -> dict[Tensor, Agreement]:
    """Apply `ops.agreement` to several parameters' gradients in one call for each dtype."""
    made: dict[Tensor, Agreement] = {}
    for group, gradients in by_dtype(rows):
        parts = ops.agreement(gradients, weights, threshold, steepness)
        made.update(zip(group, map(Agreement, *parts), strict=True))
    return made


def by_dtype(
    rows: Mapping[Tensor, Sequence[Tensor]],
) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """Yield parameters with gradients of one dtype, and a list of their gradients per domain."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for p, gradients in rows.items():
        groups.setdefault(gradients[0].dtype, []).append(p)
    for group in groups.values():
        yield group, [list(of_domain) for of_domain in zip(*(rows[p] for p in group), strict=True)]
