"""What a wrapper stages, and what every algorithm says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..domains import Partition
from ..statistics.api import Resolved
from ..statistics.factors import accumulated


class Added(NamedTuple):
    """What terms add to the losses of one micro-batch.

    Attributes:
        values: of each sample ``[N]``, times the terms' weights, with their graph.
        statistics: means over its samples, detached.
    """

    values: Tensor
    statistics: Mapping[str, Tensor]


@dataclass
class Batch:
    """One staged micro-batch: its losses, its domains, what the tape knows of its forward, what
    terms add to each loss ``[N]``, and the factor of the `backward`'s GradScaler, 0-dim."""

    losses: Tensor
    partition: Partition
    resolved: Resolved
    terms: Tensor | None
    scale: Tensor | None

    @property
    def roots(self) -> list[Tensor]:
        """Where its graph begins."""
        return [self.losses] if self.terms is None else [self.losses, self.terms]


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


def descend(objective: Tensor, staged: Sequence[Batch]) -> None:
    """One backward of the objective (0-dim) and of the mean of what terms add to it."""
    terms, shares = shared_terms(staged)
    torch.autograd.backward(
        [objective, *terms], [scaled(torch.ones_like(objective), staged), *shares]
    )


def shared_terms(staged: Sequence[Batch]) -> tuple[list[Tensor], list[Tensor]]:
    """What terms add, and the weights of the samples with which its sum is its mean, `scaled`."""
    samples = sum(batch.losses.shape[0] for batch in staged)
    terms = [batch.terms for batch in staged if batch.terms is not None]
    return terms, [scaled(torch.full_like(values, 1 / samples), staged) for values in terms]


def scaled(grad: Tensor, staged: Sequence[Batch]) -> Tensor:
    """``grad`` with the factor that ``.grad`` has under a GradScaler: that of the final call."""
    scale = staged[-1].scale
    return grad if scale is None else grad * scale.to(grad.device, non_blocking=True)
