"""The global batch of all ranks: its statistics, from the statistics of each rank's batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..statistics.moments import DomainMoments, pad_rows
from .ranks import Ranks


@dataclass(frozen=True)
class GlobalBatch:
    """The batches of all ranks, put together.

    Attributes:
        ranks: the ranks.
        count: number of samples of each domain, ``[D]``, on the device of the losses.
        samples: number of samples of all ranks, N.
        by_rank: samples of each rank and domain, ``[W, D]``; None where one rank trains.
    """

    ranks: Ranks
    count: Tensor
    samples: int
    by_rank: Tensor | None = None

    @property
    def alone(self) -> bool:
        """Whether one rank trains."""
        return self.by_rank is None

    @property
    def counts(self) -> Tensor:
        """Samples of each rank and domain, ``[W, D]``."""
        return self.count.unsqueeze(0) if self.by_rank is None else self.by_rank

    @property
    def count_before(self) -> Tensor:
        """Number of samples of each domain on the ranks before this one, ``[D]``."""
        return self.counts[: self.ranks.rank].sum(0)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum each tensor over the ranks; differentiable.

        Every rank computes the same objective from the sums, so the gradient at a sum is the same
        on all ranks, and it is the gradient at this rank's term.
        """
        if self.alone:
            return list(tensors)
        return list(_Total.apply(self.ranks, *tensors))

    def moments(self, own: DomainMoments) -> DomainMoments:
        r"""Compute the moments of the global batch from this rank's moments; differentiable.

        .. math:: m = \sum_r \tfrac{n_r}{n} m_r, \qquad v = \sum_r \tfrac{n_r}{n}\left(v_r + (m_r -
                  m)^2\right)
        """
        if self.alone:
            return own
        means = self.means(own)
        # The derivatives of v with respect to m sum to 0
        apart = [
            v + (pad_rows(own.mean[name], len(v)) - means[name].detach()[: len(v)]).square()
            for name, v in own.variance.items()
        ]
        variance = self.total([self._shared(v, own.count) for v in apart])
        return DomainMoments(means, dict(zip(means, variance, strict=True)), self.count)

    def means(self, own: DomainMoments) -> dict[str, Tensor]:
        """Compute the means of `moments` alone."""
        if self.alone:
            return own.mean
        shared = self.total([self._shared(mean, own.count) for mean in own.mean.values()])
        return dict(zip(own.mean, shared, strict=True))

    def _shared(self, values: Tensor, count: Tensor) -> Tensor:
        """Compute this rank's term of the means by domain ``[D, *]``."""
        share = pad_rows(count, len(self.count)).to(values.dtype) / self.count.clamp(min=1)
        return pad_rows(values, len(share)) * share.view(-1, *[1] * (values.dim() - 1))

    def sum_parameter_grads(self, sums: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Sum the gradients of parameters outside the optimizer over the ranks; gradients of
        other tensors stay."""
        shared = [p for p in sums if isinstance(p, nn.Parameter)]
        if self.alone or not shared:
            return sums
        totals = self.ranks.all_reduce([sums[p] for p in shared])
        return {**sums, **dict(zip(shared, totals, strict=True))}


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(ranks.all_reduce(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grads
