"""What a wrapper stages, and what every algorithm says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..domains import Partition
from ..gradients.tape import Resolved
from ..statistics.api import moments_of
from ..statistics.factors import accumulated
from ..statistics.moments import DomainMoments, rows
from .global_batch import Whole


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


def described(staged: Sequence[Batch]) -> tuple[Tensor, int, list[str]]:
    """Samples of each domain ``[D]``, of all, and the names of the parameters looked at."""
    counts = [batch.partition.count for batch in staged]
    domains = max(map(len, counts))
    count = torch.stack([rows(count, domains) for count in counts]).sum(0)
    used = sorted({name for batch in staged for name in batch.resolved.chosen})
    return count, sum(len(batch.losses) for batch in staged), used


def moments(batch: Batch, create_graph: bool) -> DomainMoments:
    """Those of the chosen parameters; the graph is kept."""
    return moments_of(
        batch.resolved,
        batch.partition,
        create_graph=create_graph,
        retain_graph=True,
        scale=batch.scale,
    )[0]


def total_loss(staged: Sequence[Batch]) -> Tensor:
    """Sum of this rank's losses, 0-dim, with its graph."""
    parts = [accumulated(batch.losses).sum() for batch in staged]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def loss_sums(staged: Sequence[Batch], domains: int) -> Tensor:
    """Sum of this rank's losses in each domain ``[D]``, detached."""
    total = accumulated(staged[0].losses.detach()).new_zeros(domains)
    for batch in staged:
        total.index_add_(0, batch.partition.domains, accumulated(batch.losses.detach()))
    return total


def domain_means(sums: Tensor, count: Tensor) -> Tensor:
    """Mean of each domain ``[D]``; NaN for an empty one."""
    return sums / count.to(sums.dtype)


def descend(objective: Tensor, staged: Sequence[Batch], whole: Whole) -> None:
    """One backward of the objective (0-dim) and of the mean of what terms add to it."""
    terms, shares = shared_terms(staged, whole)
    whole.backward([objective, *terms], [scaled(torch.ones_like(objective), staged), *shares])


def shared_terms(staged: Sequence[Batch], whole: Whole) -> tuple[list[Tensor], list[Tensor]]:
    """What terms add, and the weights of the samples with which its sum is its mean, `scaled`."""
    terms = [batch.terms for batch in staged if batch.terms is not None]
    return terms, [scaled(torch.full_like(values, 1 / whole.samples), staged) for values in terms]


def scaled(grad: Tensor, staged: Sequence[Batch]) -> Tensor:
    """``grad`` with the factor that ``.grad`` has under a GradScaler: that of the final call."""
    scale = staged[-1].scale
    return grad if scale is None else grad * scale.to(grad.device, non_blocking=True)
