"""The batch of all ranks together: the statistics of it, from those of each rank's part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..statistics.moments import DomainMoments, pad_rows
from .ranks import Ranks


@dataclass(frozen=True)
class GlobalBatch:
    """The batch of all ranks together.

    Attributes:
        ranks: they.
        counts: samples of each rank and domain, ``[W, D]``, on the device of the losses.
        samples: number of all samples, N.
    """

    ranks: Ranks
    counts: Tensor
    samples: int

    @cached_property
    def count(self) -> Tensor:
        """Samples of each domain, ``[D]``."""
        return self.counts.sum(0)

    @property
    def before(self) -> Tensor:
        """Samples of each domain that the ranks before this one have, ``[D]``."""
        return self.counts[: self.ranks.rank].sum(0)

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each summed over the ranks; differentiable.

        Every rank makes the same objective of the sums, so the gradient that arrives at one is that
        of the objective by it, on all ranks, and this rank's part of it takes it as it is.
        """
        if self.ranks.size == 1:
            return list(tensors)
        return list(_Total.apply(self.ranks, *tensors))

    def moments(self, own: DomainMoments) -> DomainMoments:
        r"""Those of all ranks, from each one's; differentiable.

        .. math:: m = \sum_r \tfrac{n_r}{n} m_r, \qquad v = \sum_r \tfrac{n_r}{n}\left(v_r + (m_r -
                  m)^2\right)
        """
        if self.ranks.size == 1:
            return own
        means = self.means(own)
        # Of v the derivatives by m add up to 0
        apart = [
            v + (pad_rows(own.mean[name], len(v)) - means[name].detach()[: len(v)]).square()
            for name, v in own.variance.items()
        ]
        variance = self.total([self._shared(v, own.count) for v in apart])
        return DomainMoments(means, dict(zip(means, variance, strict=True)), self.count)

    def means(self, own: DomainMoments) -> dict[str, Tensor]:
        """The means of `moments` alone."""
        if self.ranks.size == 1:
            return own.mean
        shared = self.total([self._shared(mean, own.count) for mean in own.mean.values()])
        return dict(zip(own.mean, shared, strict=True))

    def _shared(self, values: Tensor, count: Tensor) -> Tensor:
        """This rank's part of a mean by domain ``[D, *]``."""
        share = pad_rows(count, self.counts.shape[1]).to(values.dtype) / self.count.clamp(min=1)
        return pad_rows(values, len(share)) * share.view(-1, *[1] * (values.dim() - 1))

    def rest(self, sums: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Summed gradients of tensors that the optimizer does not have: of the parameters among
        them, those of all ranks."""
        shared = [p for p in sums if isinstance(p, nn.Parameter)]
        if self.ranks.size == 1 or not shared:
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
