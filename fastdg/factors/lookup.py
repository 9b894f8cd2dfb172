"""Per-sample gradients that are rows of a table: embeddings and indexed parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..domains import Partition
from ..dtypes import to_statistics_dtype
from .base import Agreement, PerSampleGrad, agreement_of


class Lookup(PerSampleGrad):
    r"""Gradients of a lookup in a table: :math:`g_i[v] = \sum_{t: index_{it} = v} \delta_{it}`.

    Args:
        index: row numbers ``[N, T]``.
        delta: gradients at the looked-up rows, ``[N, T, E]``.
        rows: number V of rows of the table.
    """

    def __init__(self, index: Tensor, delta: Tensor, rows: int) -> None:
        self.index, self.delta, self.rows = index, to_statistics_dtype(delta), rows
        self.shape, self.samples = (rows, delta.shape[2]), index.shape[0]

    def _reads(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum the gradients of each distinct (sample, row): ``(sums [M, E], sample [M], row [M],
        used [M])``.

        M = N * T for all data, which avoids a host sync; surplus sums are zero and not ``used``.
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
        read = self._spread(weight, cell, partition)  # share of samples that read a row
        absent = (1 - read).clamp(min=0) * mean.square()  # of samples without a read: gradient zero
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
        width = -(-self.shape[1] // (partition.num_domains + 1))  # with the result: about one table
        agreeing, magnitude = self.delta.new_zeros(()), self.delta.new_zeros(())
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
        sample = torch.arange(self.samples, device=self.index.device).unsqueeze(1)
        cell = (sample * self.rows + self.index).flatten()
        table = self.delta.new_zeros((self.samples * self.rows, self.delta.shape[2]))
        table = table.index_add(0, cell, self.delta.flatten(0, 1))
        return table.unflatten(0, (self.samples, self.rows))

    def norms(self) -> Tensor:
        sums, sample, _, _ = self._reads()
        return sums.new_zeros((self.samples,)).index_add(0, sample, sums.square().sum(1))

    def scaled(self, weights: Tensor) -> PerSampleGrad:
        delta = self.delta * weights.to(self.delta.dtype).view(-1, 1, 1)
        return Lookup(self.index, delta, self.rows)

    def take(self, number: Tensor) -> PerSampleGrad:
        return Lookup(self.index[number], self.delta[number], self.rows)

    def fold(self, samples: int) -> PerSampleGrad:
        index = self.index.unflatten(0, (samples, -1)).flatten(1, 2)
        return Lookup(index, self.delta.unflatten(0, (samples, -1)).flatten(1, 2), self.rows)

    def plus(self, other: PerSampleGrad) -> PerSampleGrad:
        if not isinstance(other, Lookup):
            return super().plus(other)
        index = torch.cat([self.index, other.index], 1)
        return Lookup(index, torch.cat([self.delta, other.delta], 1), self.rows)
