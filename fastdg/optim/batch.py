"""What a wrapper stages, and what every algorithm says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..domains import Partition
from ..statistics.api import Resolved
from ..statistics.factors import accumulated


@dataclass
class Batch:
    """One staged micro-batch: its losses, its domains, and what the tape knows of its forward."""

    losses: Tensor
    partition: Partition
    resolved: Resolved


def total_loss(staged: Sequence[Batch]) -> Tensor:
    """Sum of all losses, 0-dim, with its graph."""
    parts = [accumulated(batch.losses).sum() for batch in staged]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def domain_loss(staged: Sequence[Batch], count: Tensor) -> Tensor:
    """Mean loss of each domain ``[D]``, detached; NaN for an empty one."""
    total = accumulated(staged[0].losses.detach()).new_zeros(count.shape)
    for batch in staged:
        total.index_add_(0, batch.partition.domains, accumulated(batch.losses.detach()))
    return total / count.to(total.dtype)
