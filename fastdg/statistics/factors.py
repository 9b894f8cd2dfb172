"""Per-sample gradients of one parameter, kept in the form its layer makes them in.

Every statistic is asked of a `Factor`; what never has to be formed is never formed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..domains import Partition, single
from ..ops.window import unfold

CACHED = 1 << 15  # entries that stay in a core's cache
_EXACT = (torch.float32, torch.float64)


def accumulated(x: Tensor) -> Tensor:
    """``x`` in the dtype statistics are computed in: float64 stays, all else is float32.

    Raises:
        TypeError: ``x`` is complex.
    """
    if x.dtype in _EXACT:
        return x
    refuse_complex(x)
    return x.to(torch.float32)


def refuse_complex(x: Tensor) -> None:
    """Raise if a parameter, or its gradient, is complex."""
    if x.is_complex():
        raise TypeError(
            f"params: expected real parameters, got {x.dtype}. Keep real and imaginary part in a "
            "real parameter and read it by torch.view_as_complex in the forward, or freeze this one"
        )


def flat(grads: Tensor) -> Tensor:
    """``[N, *shape]`` as ``[N, numel]``; the shape may be that of a scalar."""
    return grads.flatten(1) if grads.dim() > 1 else grads.unsqueeze(1)


class Agreement(NamedTuple):
    """What `ops.agreement` makes of one parameter.

    Attributes:
        combined: weighted sum of the domains' gradients times the mask, of the parameter's shape.
        agreeing: sum of the mask, 0-dim.
        magnitude: sum of ``combined.abs()``, 0-dim.
    """

    combined: Tensor
    agreeing: Tensor
    magnitude: Tensor


def agreement_of(
    rows: Sequence[Tensor], weights: Tensor, threshold: float, steepness: float
) -> Agreement:
    """`ops.agreement` of one parameter's gradients, one of each domain."""
    (combined,), agreeing, magnitude = ops.agreement(
        [[row] for row in rows], weights, threshold, steepness
    )
    return Agreement(combined, agreeing[0], magnitude[0])


class Factor(ABC):
    """Gradients :math:`g_1..g_N` of one parameter of shape ``shape``."""

    shape: Sequence[int]
    samples: int

    @abstractmethod
    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each domain, each ``[D, *shape]``; differentiable."""

    @abstractmethod
    def domain(self, partition: Partition) -> Tensor:
        """Mean gradient of each domain, ``[D, *shape]``."""

    @abstractmethod
    def per_sample(self) -> Tensor:
        """The gradients themselves, ``[N, *shape]``."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Squared norms, ``[N]``."""

    @abstractmethod
    def scaled(self, weights: Tensor) -> Factor:
        """The gradients times ``weights [N]``."""

    @abstractmethod
    def take(self, number: Tensor) -> Factor:
        """The gradients of the samples ``number`` ``[K]`` alone."""

    @abstractmethod
    def fold(self, samples: int) -> Factor:
        """Rows folded into the batch (sample-major) brought back: ``[k * N] -> [N]``, summed over
        k."""

    def gram(self, partition: Partition) -> Tensor:
        """Inner products of the domains' mean gradients, ``[D, D]``."""
        rows = flat(self.domain(partition))
        return rows @ rows.t()

    def agreement(
        self, partition: Partition, weights: Tensor, threshold: float, steepness: float
    ) -> Agreement:
        """The domains' mean gradients combined where their signs agree, as `ops.agreement` does."""
        return agreement_of(self.domain(partition).unbind(), weights, threshold, steepness)

    def plus(self, other: Factor) -> Factor:
        """The gradient of a parameter that is used twice."""
        return Dense(self.per_sample() + other.per_sample())


def total(parts: Sequence[Factor]) -> Factor:
    """One factor for all uses of a parameter: summed before anything is squared."""
    return reduce(lambda a, b: a.plus(b), parts)


class Dense(Factor):
    """Gradients that are small enough to hold: biases, norm weights, modules without a rule.

    Args:
        grads: ``[N, *shape]``.
    """

    def __init__(self, grads: Tensor) -> None:
        self.grads = accumulated(grads)
        self.shape, self.samples = grads.shape[1:], grads.shape[0]

    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        mean, variance = ops.moments(flat(self.grads), partition.order, partition.offsets)
        shape = (partition.num_domains, *self.shape)
        return mean.view(shape), variance.view(shape)

    def domain(self, partition: Partition) -> Tensor:
        # As products with 1: an index_add wakes torch's threads several times for a few numbers
        rows = flat(self.grads).unsqueeze(1)
        ones = rows.new_ones(()).expand(len(rows), 1, 1)
        mean = ops.outer_domain(rows, ones, partition.order, partition.offsets)
        return mean.view(partition.num_domains, *self.shape)

    def per_sample(self) -> Tensor:
        return self.grads

    def norms(self) -> Tensor:
        return flat(self.grads).square().sum(1)

    def scaled(self, weights: Tensor) -> Factor:
        return Dense(self.grads * weights.view(-1, *([1] * len(self.shape))))

    def take(self, number: Tensor) -> Factor:
        return Dense(self.grads[number])

    def fold(self, samples: int) -> Factor:
        return Dense(self.grads.unflatten(0, (samples, -1)).sum(1))


class Outer(Factor):
    r"""Weights of linear maps: :math:`g_i = \sum_t \delta_{it} \otimes a_{it}`.

    Args:
        a: layer inputs ``[N, T, I]``, or ``[N, I]``; with ``window`` a padded convolution input
            ``[N, C, *S]``.
        delta: gradients at the outputs, ``[N, T, O]``, or ``[N, O]``.
        shape: shape of the weight; its numel is ``O * I / groups``.
        window: ``[*kernel, *stride, *dilation]`` of a convolution, or empty.
        groups: blocks that see their own channels only. They are served as further domains.
    """

    def __init__(
        self,
        a: Tensor,
        delta: Tensor,
        shape: Sequence[int],
        window: Sequence[int] = (),
        groups: int = 1,
    ) -> None:
        a, delta = accumulated(a), accumulated(delta)
        if a.dtype != delta.dtype:
            a, delta = a.double(), delta.double()
        self.factors = a, delta  # as given, one row a sample without a dimension for it
        self.shape, self.samples = tuple(shape), a.shape[0]
        self.window, self.groups = list(window), groups

    @property
    def a(self) -> Tensor:
        a, _ = self.factors
        return a.unsqueeze(1) if a.dim() == 2 else a

    @property
    def delta(self) -> Tensor:
        _, delta = self.factors
        return delta.unsqueeze(1) if delta.dim() == 2 else delta

    def _grouped(self) -> tuple[Tensor, Tensor]:
        """``a`` and ``delta`` with one row for each (sample, group)."""
        if self.groups == 1:
            return self.a, self.delta
        a = self.a.unflatten(1, (self.groups, -1)).flatten(0, 1)
        delta = self.delta.transpose(1, 2).unflatten(1, (self.groups, -1)).flatten(0, 1)
        return a, delta.transpose(1, 2)

    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        blocks = partition.grouped(self.groups)
        mean, variance = ops.outer_moments(
            *self._grouped(), blocks.order, blocks.offsets, self.window
        )
        shape = (partition.num_domains, *self.shape)
        return mean.view(shape), variance.view(shape)

    def domain(self, partition: Partition) -> Tensor:
        blocks = partition.grouped(self.groups)
        mean = ops.outer_domain(*self._grouped(), blocks.order, blocks.offsets, self.window)
        return mean.view(partition.num_domains, *self.shape)

    def gram(self, partition: Partition) -> Tensor:
        if self.groups > 1:
            return super().gram(partition)
        return ops.outer_gram(self.a, self.delta, partition.order, partition.offsets, self.window)

    def agreement(
        self, partition: Partition, weights: Tensor, threshold: float, steepness: float
    ) -> Agreement:
        # Where D of it are small, making them all first is faster on the CPU, up to three times
        # with thousands of samples; and of many groups the weight is small
        entries = partition.num_domains * math.prod(self.shape)
        if self.groups > partition.num_domains or (self.delta.is_cpu and entries <= CACHED):
            return super().agreement(partition, weights, threshold, steepness)
        where = partition.order, partition.offsets
        parts = [
            ops.outer_agreement(a, delta, *where, weights, threshold, steepness, self.window)
            for a, delta in zip(
                self.a.chunk(self.groups, 1) if self.groups > 1 else [self.a],
                self.delta.chunk(self.groups, 2),
                strict=True,
            )
        ]
        combined, agreeing, magnitude = zip(*parts, strict=True)
        if len(parts) == 1:
            return Agreement(combined[0].view(self.shape), agreeing[0], magnitude[0])
        return Agreement(
            torch.cat(combined).view(self.shape),
            torch.stack(agreeing).sum(),
            torch.stack(magnitude).sum(),
        )

    def per_sample(self) -> Tensor:
        a, delta = self._grouped()
        grads = torch.bmm(delta.transpose(1, 2), unfold(a, self.window))
        return grads.reshape(self.samples, *self.shape)

    def norms(self) -> Tensor:
        return ops.outer_norms(*self._grouped(), self.window).view(self.samples, -1).sum(1)

    def scaled(self, weights: Tensor) -> Factor:
        delta = self.delta * weights.to(self.delta.dtype).view(-1, 1, 1)
        return Outer(self.a, delta, self.shape, self.window, self.groups)

    def take(self, number: Tensor) -> Factor:
        return Outer(self.a[number], self.delta[number], self.shape, self.window, self.groups)

    def _rows(self) -> Outer:
        """The same without a window: the patches become rows."""
        if not self.window:
            return self
        return Outer(unfold(self.a, self.window), self.delta, self.shape)

    def fold(self, samples: int) -> Factor:
        if self.groups > 1:
            return Dense(self.per_sample()).fold(samples)
        rows = self._rows()
        a, delta = (x.unflatten(0, (samples, -1)).flatten(1, 2) for x in (rows.a, rows.delta))
        return Outer(a, delta, self.shape)

    def plus(self, other: Factor) -> Factor:
        if not isinstance(other, Outer) or self.groups > 1 or other.groups > 1:
            return super().plus(other)
        one, two = self._rows(), other._rows()
        return Outer(torch.cat([one.a, two.a], 1), torch.cat([one.delta, two.delta], 1), self.shape)


class Lookup(Factor):
    r"""Rows of a table that were looked up: :math:`g_i[v] = \sum_{t: index_{it} = v} \delta_{it}`.

    Args:
        index: row numbers ``[N, T]``.
        delta: gradients at what was read, ``[N, T, E]``.
        rows: rows V of the table.
    """

    def __init__(self, index: Tensor, delta: Tensor, rows: int) -> None:
        self.index, self.delta, self.rows = index, accumulated(delta), rows
        self.shape, self.samples = (rows, delta.shape[2]), index.shape[0]

    def _reads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradient sums of each distinct (sample, row): ``(sums [M, E], sample [M], row [M], used
        [M])``.

        M = N * T whatever the data, so that nothing waits for the device; the surplus sums are
        zero and not ``used``.
        """
        sample = torch.arange(self.samples, device=self.index.device).unsqueeze(1)
        key, by_key = (sample * self.rows + self.index).flatten().sort()
        fresh = torch.ones_like(key)
        fresh[1:] = (key[1:] != key[:-1]).to(key.dtype)
        slot = fresh.cumsum(0) - 1
        delta = self.delta.flatten(0, 1)
        sums = delta.new_zeros(delta.shape).index_add(0, slot, delta[by_key])
        owner = torch.zeros_like(key).scatter(0, slot, key)
        used = torch.arange(len(key), device=key.device) <= slot[-1:]
        return sums, owner // self.rows, owner % self.rows, used

    def _spread(self, values: Tensor, cell: Tensor, partition: Partition) -> Tensor:
        table = values.new_zeros((partition.num_domains, self.rows, values.shape[1]))
        table.flatten(0, 1).index_add_(0, cell, values)
        return table.div_(partition.count.clamp(min=1).to(values.dtype).view(-1, 1, 1))

    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        sums, sample, row, used = self._reads()
        cell = partition.domains[sample] * self.rows + row
        mean = self._spread(sums, cell, partition)
        weight = used.to(sums.dtype).unsqueeze(1)
        centred = (sums - mean.flatten(0, 1).index_select(0, cell)).square() * weight
        read = self._spread(weight, cell, partition)  # share of the domain that reads each row
        absent = (1 - read).clamp(min=0) * mean.square()  # the others' gradient there is zero
        return mean, self._spread(centred, cell, partition) + absent

    def domain(self, partition: Partition) -> Tensor:
        return self._columns(self.delta, partition)

    def _columns(self, delta: Tensor, partition: Partition) -> Tensor:
        cell = partition.domains.unsqueeze(1) * self.rows + self.index
        return self._spread(delta.flatten(0, 1), cell.flatten(), partition)

    def agreement(
        self, partition: Partition, weights: Tensor, threshold: float, steepness: float
    ) -> Agreement:
        combined = self.delta.new_empty(tuple(self.shape))
        width = -(-self.shape[1] // (partition.num_domains + 1))  # with the result about one table
        agreeing, magnitude = self.delta.new_zeros(()), self.delta.new_zeros(())
        for delta, columns in zip(
            self.delta.split(width, 2), combined.split(width, 1), strict=True
        ):
            rows = self._columns(delta, partition).unbind()
            part = agreement_of(rows, weights, threshold, steepness)
            del rows  # before there are the next
            columns.copy_(part.combined)
            agreeing += part.agreeing
            magnitude += part.magnitude
        return Agreement(combined, agreeing, magnitude)

    def per_sample(self) -> Tensor:
        sample = torch.arange(self.samples, device=self.index.device).unsqueeze(1)
        cell = (sample * self.rows + self.index).flatten()
        table = self.delta.new_zeros((self.samples * self.rows, self.delta.shape[2]))
        table = table.index_add(0, cell, self.delta.flatten(0, 1))
        return table.unflatten(0, (self.samples, self.rows))

    def norms(self) -> Tensor:
        sums, sample, _, _ = self._reads()
        return sums.new_zeros((self.samples,)).index_add(0, sample, sums.square().sum(1))

    def scaled(self, weights: Tensor) -> Factor:
        delta = self.delta * weights.to(self.delta.dtype).view(-1, 1, 1)
        return Lookup(self.index, delta, self.rows)

    def take(self, number: Tensor) -> Factor:
        return Lookup(self.index[number], self.delta[number], self.rows)

    def fold(self, samples: int) -> Factor:
        index = self.index.unflatten(0, (samples, -1)).flatten(1, 2)
        return Lookup(index, self.delta.unflatten(0, (samples, -1)).flatten(1, 2), self.rows)

    def plus(self, other: Factor) -> Factor:
        if not isinstance(other, Lookup):
            return super().plus(other)
        index = torch.cat([self.index, other.index], 1)
        return Lookup(index, torch.cat([self.delta, other.delta], 1), self.rows)


def weighted_sum(factor: Factor, weights: Tensor) -> Tensor:
    """``sum_i weights_i g_i``, of the parameter's shape."""
    everything = single(factor.samples, weights.device)
    return factor.scaled(weights).domain(everything)[0] * factor.samples
