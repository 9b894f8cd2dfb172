from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler


class Endless(torch.utils.data.Sampler):
    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.sampler


class InfiniteDataLoader:
    def __init__(self, dataset: Any, batch_size: int, replacement: bool = True) -> None:
        order = RandomSampler(dataset, replacement=replacement)
        batches = BatchSampler(order, batch_size, drop_last=replacement)
        self.length = len(batches)
        self.iterator = iter(DataLoader(dataset, batch_sampler=Endless(batches)))

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield next(self.iterator)


class FastDataLoader(InfiniteDataLoader):
    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, 64, replacement=False)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.length):
            yield next(self.iterator)
