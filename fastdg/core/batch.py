"""Micro-batches of a step, and sums over their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..capture.head_output import HeadOutput
from ..domains import Partition, group_sums
from ..dtypes import to_statistics_dtype
from ..gradients.tape import TrackedForward
from ..statistics.moments import pad_rows


class PenaltyOutput(NamedTuple):
    """Penalties that terms add to the losses of one micro-batch.

    Attributes:
        values: sum of the terms for each sample ``[N]``, times their weights, with the graph.
        statistics: means over the samples, detached.
    """

    values: Tensor
    statistics: Mapping[str, Tensor]


@dataclass
class Batch:
    """One staged micro-batch.

    Attributes:
        losses: ``[N]``, with their graph.
        partition: samples by domain.
        tracked: tracked parameters below the losses.
        terms: penalty that terms add to each loss ``[N]``.
        scale: loss scale of the `backward`'s GradScaler, 0-dim.
        output: logits of the losses, if an algorithm asks for them.
        inputs: further inputs of the `backward`, which the algorithm takes.
        retain_graph: whether the graph of the losses is kept for a further backward.
    """

    losses: Tensor
    partition: Partition
    tracked: TrackedForward
    terms: Tensor | None
    scale: Tensor | None
    output: HeadOutput | None = field(default=None, kw_only=True)
    inputs: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    retain_graph: bool = field(default=False, kw_only=True)


def counted(staged: Sequence[Batch]) -> tuple[Tensor, int]:
    """Return the samples of each domain ``[D]``, and of all."""
    counts = [batch.partition.count for batch in staged]
    count = counts[0]
    if len(counts) > 1:
        domains = max(map(len, counts))
        count = torch.stack([pad_rows(count, domains) for count in counts]).sum(0)
    return count, sum(batch.losses.shape[0] for batch in staged)


def total_loss(staged: Sequence[Batch]) -> Tensor:
    """Sum this rank's losses, 0-dim, with the graph."""
    return reduce(torch.add, [to_statistics_dtype(batch.losses).sum() for batch in staged])


def domain_sums(staged: Sequence[Batch], domains: int) -> Tensor:
    """Sum this rank's losses of each domain ``[D]``, with the graph."""
    return reduce(
        torch.add,
        [
            group_sums(to_statistics_dtype(batch.losses), batch.partition.domains, domains)
            for batch in staged
        ],
    )


def known_sums(staged: Sequence[Batch], domains: int) -> Tensor | None:
    """Return `domain_sums` without the graph, if the partitions have them."""
    sums = [x for batch in staged if (x := batch.partition.loss_sums) is not None]
    if len(sums) < len(staged):
        return None
    return reduce(torch.add, [pad_rows(x, domains) for x in sums])
