"""Per-sample gradients that are rows of a table: embeddings and indexed parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..domains import Partition
from ..dtypes import to_operand_dtype, to_statistics_dtype
from .base import Agreement, PerSampleGrad, agreement_of


class Lookup(PerSampleGrad):
    r"""Gradients of a lookup in a table: :math:`g_i[v] = \sum_{t: index_{it} = v} \delta_{it}`.

    Args:
        index: row numbers ``[N, T]``.
        delta: gradients at the looked-up rows, ``[N, T, E]``.
        rows: number V of rows of the table.

    Attributes:
        index: row number of each of the M reads, ``[M]``.
        delta: gradient at each read, ``[M, E]``.
        sample: sample of each read, ``[M]``.
    """

    def __init__(self, index: Tensor, delta: Tensor, rows: int) -> None:
        samples, positions = index.shape
        place = torch.arange(samples * positions, device=index.device)
        self.sample = place // max(positions, 1)
        self.index, self.delta = index.flatten(), to_operand_dtype(delta.flatten(0, 1))
        self.rows, self.samples = rows, samples
        self.shape = (rows, delta.shape[2])

    @classmethod
    def ragged(
        cls, index: Tensor, delta: Tensor, sample: Tensor, rows: int, samples: int
    ) -> Lookup:
        """Gradients of any number of reads of each sample.

        Args:
            index: row number of each read, ``[M]``.
            delta: gradient at each read, ``[M, E]``.
            sample: sample of each read, ``[M]``.
            rows: number V of rows of the table.
            samples: N.
        """
        found = cls(index.unsqueeze(0), delta.unsqueeze(0), rows)
        found.sample, found.samples = sample, samples
        return found

    def _by_sample(self) -> tuple[Tensor, Tensor]:
        """Sum the gradients of each distinct row of each sample: ``(sums [M, E], cell [M])``.

        The cell is ``sample * V + row``. There is room for M sums, which avoids a host sync; the
        cell of surplus sums is N * V.
        """
        cell = self.sample * self.rows + self.index
        reads, cell = _Reads.of(self.delta, cell, self.samples * self.rows)
        return reads.sums(), cell

    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        sums, cell = self._by_sample()
        sample, absent = cell // self.rows, partition.num_domains * self.rows
        domain = partition.domains[sample.clamp(max=self.samples - 1)]
        cell = (domain * self.rows + cell % self.rows).where(sample < self.samples, absent)
        reads, cell, share = self._by_cell(sums, cell, partition)
        mean = share * reads.mean
        spread = reads.variance + (reads.mean - mean).square()
        others = (1 - share).clamp(min=0) * mean.square()  # samples without a read: gradient zero
        cells = partition.num_domains, self.rows
        return _table(mean, cell, cells), _table(share * spread + others, cell, cells)

    def domain(self, partition: Partition) -> Tensor:
        return self._columns(self.delta, partition)

    def _columns(self, delta: Tensor, partition: Partition) -> Tensor:
        cell = partition.domains[self.sample] * self.rows + self.index
        reads, cell, share = self._by_cell(delta, cell, partition)
        return _table(share * reads.mean, cell, (partition.num_domains, self.rows))

    def _by_cell(
        self, values: Tensor, cell: Tensor, partition: Partition
    ) -> tuple[_Reads, Tensor, Tensor]:
        """Return the reads of each (domain, row), its number, and how many there are for each
        sample of the domain."""
        last = partition.num_domains - 1
        reads, cell = _Reads.of(values, cell, partition.num_domains * self.rows)
        samples = partition.count.clamp(min=1)[(cell // self.rows).clamp(max=last)]
        return reads, cell, (reads.count.to(reads.mean.dtype) / samples).unsqueeze(1)

    def forms_domains(self, domains: int) -> bool:
        return False

    def agreement(
        self, partition: Partition, weights: Tensor, threshold: float, steepness: float
    ) -> Agreement:
        combined = to_statistics_dtype(self.delta[:0]).new_empty(tuple(self.shape))
        width = -(-self.shape[1] // (partition.num_domains + 1))  # with the result: about one table
        agreeing, magnitude = combined.new_zeros(()), combined.new_zeros(())
        for delta, columns in zip(
            self.delta.split(width, 1), combined.split(width, 1), strict=True
        ):
            rows = self._columns(delta, partition).unbind()
            part = agreement_of(rows, weights, threshold, steepness)
            del rows  # before the next rows exist
            columns.copy_(part.combined)
            agreeing += part.agreeing
            magnitude += part.magnitude
        return Agreement(combined, agreeing, magnitude)

    def per_sample(self) -> Tensor:
        return _table(*self._by_sample(), (self.samples, self.rows))

    def norms(self) -> Tensor:
        sums, cell = self._by_sample()
        squares = sums.square().sum(1, keepdim=True)
        # The cells are in the order of the samples, and surplus sums are zero
        sample = (cell // self.rows).clamp(max=self.samples - 1)
        order = torch.arange(len(cell), device=cell.device)
        reads = _Reads(squares, order, sample, self.samples)
        return reads.sums().squeeze(1)

    def scaled(self, weights: Tensor) -> PerSampleGrad:
        delta = to_statistics_dtype(self.delta)  # a product with a weight would be rounded
        delta = delta * weights.to(delta.dtype)[self.sample].unsqueeze(1)
        return Lookup.ragged(self.index, delta, self.sample, self.rows, self.samples)

    def take(self, number: slice) -> PerSampleGrad:
        begin, end, _ = number.indices(self.samples)
        outside = (self.sample < begin) | (self.sample >= end)  # their rows get zeros
        delta = self.delta.masked_fill(outside.unsqueeze(1), 0)
        sample = (self.sample - begin).masked_fill(outside, 0)
        return Lookup.ragged(self.index, delta, sample, self.rows, end - begin)

    def fold(self, samples: int) -> PerSampleGrad:
        sample = self.sample // (self.samples // samples)
        return Lookup.ragged(self.index, self.delta, sample, self.rows, samples)

    def plus(self, other: PerSampleGrad) -> PerSampleGrad:
        if not isinstance(other, Lookup):
            return super().plus(other)
        index, sample = torch.cat([self.index, other.index]), torch.cat([self.sample, other.sample])
        delta = torch.cat([self.delta, other.delta])
        return Lookup.ragged(index, delta, sample, self.rows, self.samples)


class _Reads:
    """Rows of values summed by slot: no atomics, so that sums have the same bits in each run.

    Args:
        values: ``[M, E]``.
        order: numbers of rows, sorted by slot, ``[M]``.
        slot: the slot of each, ascending, ``[M]``.
        slots: number of slots; default: M.
    """

    def __init__(
        self, values: Tensor, order: Tensor, slot: Tensor, slots: int | None = None
    ) -> None:
        number = len(slot) if slots is None else slots
        offsets = torch.searchsorted(slot, torch.arange(number + 1, device=slot.device))
        self.first, self.count = offsets[:-1], offsets.diff()
        self.mean, self.variance = ops.moments(values, order, offsets)

    @classmethod
    def of(cls, values: Tensor, cell: Tensor, absent: int) -> tuple[_Reads, Tensor]:
        """Give each distinct cell a slot: the reads, and the cell of each slot; ``absent`` where
        there are more slots than cells."""
        cell, order = cell.sort(stable=True)
        fresh = torch.zeros_like(cell)
        fresh[1:] = cell[1:] != cell[:-1]
        reads = cls(values, order, fresh.cumsum(0))
        if len(cell):
            cell = cell[reads.first.clamp(max=len(cell) - 1)].where(reads.count > 0, absent)
        return reads, cell

    def sums(self) -> Tensor:
        return self.mean * self.count.to(self.mean.dtype).unsqueeze(1)


def _table(values: Tensor, cell: Tensor, cells: Sequence[int]) -> Tensor:
    """Put ``values [M, E]`` into their cells, ``[*cells, E]``; one past the last is left out."""
    table = values.new_zeros((math.prod(cells) + 1, values.shape[1]))
    return table.index_copy_(0, cell, values)[:-1].unflatten(0, tuple(cells))
