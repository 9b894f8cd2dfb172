"""Moments by domain, and their merge over batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..domains import readable


@dataclass(frozen=True)
class DomainMoments:
    """Mean and biased variance of per-sample gradients, by domain.

    Attributes:
        mean, variance: name -> ``[D, *shape]``; zeros for an empty domain.
        count: samples of each domain, ``[D]`` int64.
    """

    mean: dict[str, Tensor]
    variance: dict[str, Tensor]
    count: Tensor

    @cached_property
    def present(self) -> Tensor:
        """Domains that have samples, ``[D]`` bool."""
        return self.count > 0

    def __repr__(self) -> str:
        # The tensors are as large as the model, times the domains
        shapes = ", ".join(f"{name!r}: {tuple(mean.shape)}" for name, mean in self.mean.items())
        return f"DomainMoments(mean and variance: {{{shapes}}}, count={self.count})"

    @cached_property
    def number_present(self) -> int | Tensor:
        """Number of domains that have samples, 1 at least; 0-dim where it would wait to read it."""
        if readable(self.count):
            counts = self.count.tolist()
            return max(1, len(counts) - counts.count(0))
        return self.present.sum().clamp(min=1)


def pad_rows(tensor: Tensor, domains: int) -> Tensor:
    """Pad ``tensor [d, *]`` with zero rows to ``[domains, *]``."""
    if tensor.shape[0] == domains:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((domains - tensor.shape[0], *tensor.shape[1:]))])


def variance_gap(
    values: Sequence[Tensor], history: Sequence[Tensor], present: Tensor, decay: float
) -> Tensor:
    """Call `ops.variance_gap`; parameters of two dtypes are taken in float64. ``present`` may have
    more domains than ``values``."""
    if len({v.dtype for v in values}) > 1:
        values, history = [v.double() for v in values], [m.double() for m in history]
    rows = values[0].shape[0]
    if present.shape[0] > rows:
        present = present[:rows]
    return ops.variance_gap(values, history, present, decay)


def merge(parts: Sequence[DomainMoments]) -> DomainMoments:
    r"""Merge the moments of batches, weighted by count; differentiable.

    .. math:: m = \sum_b \tfrac{n_b}{n} m_b, \qquad v = \sum_b \tfrac{n_b}{n}\left(v_b + (m_b -
    m)^2\right)

    A parameter that only some of the batches used has zero gradients in the others.
    """
    if len(parts) == 1:
        return parts[0]
    domains = max(part.count.shape[0] for part in parts)
    counts = [pad_rows(part.count, domains) for part in parts]
    count = torch.stack(counts).sum(0)
    mean: dict[str, Tensor] = {}
    variance: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part.variance):
        like = next(part.mean[name] for part in parts if name in part.mean)
        zero = like.new_zeros((domains, *like.shape[1:]))
        wide = [1] * (like.dim() - 1)
        shares = [(c.to(like.dtype) / count.clamp(min=1)).view(-1, *wide) for c in counts]
        means = [
            pad_rows(part.mean[name], domains) if name in part.mean else zero for part in parts
        ]
        m = torch.stack([s * x for s, x in zip(shares, means, strict=True)]).sum(0)
        v = zero
        for part, share, part_mean in zip(parts, shares, means, strict=True):
            own = pad_rows(part.variance[name], domains) if name in part.variance else zero
            v = v + share * (own + (part_mean - m).square())
        mean[name], variance[name] = m, v
    return DomainMoments(mean, variance, count)
