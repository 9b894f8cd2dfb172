from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset


class Debug28:
    ENVIRONMENTS = ("0", "1", "2")
    input_shape: tuple[int, ...] = (3, 28, 28)
    num_classes = 2

    def __init__(self, root: Any, test_envs: list[int], hparams: Any) -> None:
        self.datasets = [
            TensorDataset(torch.randn(40, *self.input_shape), torch.randint(0, 2, (40,)))
            for _ in self.ENVIRONMENTS
        ]

    def __getitem__(self, index: int) -> TensorDataset:
        return self.datasets[index]

    def __len__(self) -> int:
        return len(self.datasets)


class Debug32(Debug28):
    input_shape = (3, 32, 32)
