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
    """

    def __init__(self, index: Tensor, delta: Tensor, rows: int) -> None:
        self.index, self.delta, self.rows = index, to_operand_dtype(delta), rows
        self.shape, self.samples = (rows, delta.shape[2]), index.shape[0]

    def _by_sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the gradients of each distinct row of each sample: ``(sums [N, T, E], row [N, T],
        used [N, T])``.

        T for all data, which avoids a host sync; surplus sums are zero and not ``used``.
        """
        samples, positions = self.index.shape
        if positions == 0:
            return to_statistics_dtype(self.delta), self.index, self.index == 0
        row, place = self.index.sort(dim=1, stable=True)
        fresh = torch.ones_like(row)
        fresh[:, 1:] = row[:, 1:] != row[:, :-1]
        first = torch.arange(samples, device=row.device).unsqueeze(1) * positions
        slot = fresh.cumsum(1) - 1 + first
        reads = _Reads(self.delta.flatten(0, 1), (place + first).flatten(), slot.flatten())
        sums, used = reads.sums(), reads.count > 0
        where = reads.first.clamp(max=row.numel() - 1)
        return tuple(
            x.unflatten(0, (samples, positions)) for x in (sums, row.flatten()[where], used)
        )

    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        sums, row, used = self._by_sample()
        absent = partition.num_domains * self.rows
        cell = (partition.domains.unsqueeze(1) * self.rows + row).where(used, absent)
        reads, cell, share = self._by_cell(sums.flatten(0, 1), cell.flatten(), partition)
        mean = share * reads.mean
        spread = reads.variance + (reads.mean - mean).square()
        others = (1 - share).clamp(min=0) * mean.square()  # samples without a read: gradient zero
        cells = partition.num_domains, self.rows
        return _table(mean, cell, cells), _table(share * spread + others, cell, cells)

    def domain(self, partition: Partition) -> Tensor:
        return self._columns(self.delta, partition)

    def _columns(self, delta: Tensor, partition: Partition) -> Tensor:
        cell = partition.domains.unsqueeze(1) * self.rows + self.index
        reads, cell, share = self._by_cell(delta.flatten(0, 1), cell.flatten(), partition)
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
            self.delta.split(width, 2), combined.split(width, 1), strict=True
        ):
            rows = self._columns(delta, partition).unbind()
            part = agreement_of(rows, weights, threshold, steepness)
            del rows  # before the next rows exist
            columns.copy_(part.combined)
            agreeing += part.agreeing
            magnitude += part.magnitude
        return Agreement(combined, agreeing, magnitude)

    def per_sample(self) -> Tensor:
        sums, row, used = self._by_sample()
        sample = torch.arange(self.samples, device=row.device).unsqueeze(1)
        cell = (sample * self.rows + row).where(used, self.samples * self.rows)
        return _table(sums.flatten(0, 1), cell.flatten(), (self.samples, self.rows))

    def norms(self) -> Tensor:
        sums, _, _ = self._by_sample()
        return sums.square().sum((1, 2))

    def scaled(self, weights: Tensor) -> PerSampleGrad:
        delta = to_statistics_dtype(self.delta)  # a product with a weight would be rounded
        return Lookup(self.index, delta * weights.to(delta.dtype).view(-1, 1, 1), self.rows)

    def take(self, number: slice) -> PerSampleGrad:
        return Lookup(self.index[number], self.delta[number], self.rows)

    def fold(self, samples: int) -> PerSampleGrad:
        index = self.index.unflatten(0, (samples, -1)).flatten(1, 2)
        return Lookup(index, self.delta.unflatten(0, (samples, -1)).flatten(1, 2), self.rows)

    def plus(self, other: PerSampleGrad) -> PerSampleGrad:
        if not isinstance(other, Lookup):
            return super().plus(other)
        index = torch.cat([self.index, other.index], 1)
        return Lookup(index, torch.cat([self.delta, other.delta], 1), self.rows)


class _Reads:
    """Rows of values summed by slot: no atomics, so that sums have the same bits in each run.

    Args:
        values: ``[M, E]``.
        order: numbers of rows, sorted by slot, ``[M]``.
        slot: the slot of each, ascending, below M, ``[M]``.
    """

    def __init__(self, values: Tensor, order: Tensor, slot: Tensor) -> None:
        slots = torch.arange(len(slot) + 1, device=slot.device)
        offsets = torch.searchsorted(slot, slots)
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
