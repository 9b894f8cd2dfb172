"""Statistics of per-sample gradients that come a chunk of samples at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..domains import Partition, group_sums, partition
from ..factors import flat
from ..ops.dispatch.derivatives import call
from .moments import DomainMoments, merge
from .problem import Chunk, Problem


class Reduction(ABC):
    """A statistic that takes in one chunk after the other."""

    def __init__(self, problem: Problem, domains: Tensor, num_domains: int) -> None:
        self.problem, self.domains, self.num_domains = problem, domains, num_domains

    @abstractmethod
    def part(self, chunk: Chunk, grads: list[Tensor]) -> list[Tensor]:
        """Reduce a chunk of per-sample gradients."""

    @abstractmethod
    def add(self, chunk: Chunk, part: list[Tensor]) -> None:
        """Add the `part` of a chunk."""

    @abstractmethod
    def result(self) -> list[Tensor]:
        """Return the statistic of all chunks."""

    @abstractmethod
    def pull(
        self, chunk: Chunk, grads: list[Tensor], result: list[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        """Pull ``upstream``, the gradients of `result`, back to a chunk's ``grads``."""


class Moments(Reduction):
    """Means, then variances, by domain: merged from the moments of each chunk."""

    merged: DomainMoments | None = None

    def part(self, chunk: Chunk, grads: list[Tensor]) -> list[Tensor]:
        parts = self._partition(chunk, grads[0])
        pairs = [ops.moments(flat(g), parts.order, parts.offsets) for g in grads]
        shapes = [(self.num_domains, *g.shape[1:]) for g in grads]
        return [
            pair[k].view(shape) for k in (0, 1) for pair, shape in zip(pairs, shapes, strict=True)
        ]

    def add(self, chunk: Chunk, part: list[Tensor]) -> None:
        names = self.problem.names
        moments = DomainMoments(
            dict(zip(names, part[: len(names)], strict=True)),
            dict(zip(names, part[len(names) :], strict=True)),
            self._partition(chunk, part[0]).count,
        )
        self.merged = moments if self.merged is None else merge([self.merged, moments])

    def result(self) -> list[Tensor]:
        assert self.merged is not None
        return [*self.merged.mean.values(), *self.merged.variance.values()]

    def pull(
        self, chunk: Chunk, grads: list[Tensor], result: list[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        parts, P = self._partition(chunk, grads[0]), len(grads)
        ones = torch.ones_like(self.domains)
        total = group_sums(ones, self.domains, self.num_domains).clamp(min=1)
        pulled = []
        for g, mean, up_mean, up_variance in zip(
            grads, result[:P], upstream[:P], upstream[P:], strict=True
        ):
            # The op divides by the samples of the chunk; the moments belong to all chunks.
            share = (parts.count.to(g.dtype) / total).unsqueeze(1)
            back = call(
                "moments_backward",
                flat(up_mean) * share,
                flat(up_variance) * share,
                flat(g),
                flat(mean),
                parts.order,
                parts.offsets,
            )
            pulled.append(back.view(g.shape))
        return pulled

    def _partition(self, chunk: Chunk, like: Tensor) -> Partition:
        ids = self.domains[slice(*chunk)]
        return partition(ids, like.new_empty(ids.shape), self.num_domains)


class Samples(Reduction):
    """The per-sample gradients themselves."""

    out: list[Tensor] | None = None

    def part(self, chunk: Chunk, grads: list[Tensor]) -> list[Tensor]:
        return grads

    def add(self, chunk: Chunk, part: list[Tensor]) -> None:
        if self.out is None:
            self.out = [g.new_empty((self.problem.samples, *g.shape[1:])) for g in part]
        for out, g in zip(self.out, part, strict=True):
            out[slice(*chunk)] = g

    def result(self) -> list[Tensor]:
        assert self.out is not None
        return self.out

    def pull(
        self, chunk: Chunk, grads: list[Tensor], result: list[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        return [up[slice(*chunk)] for up in upstream]


class Norms(Reduction):
    """The norm of each sample's gradient over all parameters."""

    out: Tensor | None = None

    def part(self, chunk: Chunk, grads: list[Tensor]) -> list[Tensor]:
        return [torch.stack([flat(g).norm(dim=1) for g in grads]).norm(dim=0)]

    def add(self, chunk: Chunk, part: list[Tensor]) -> None:
        self.out = part[0] if self.out is None else torch.cat([self.out, part[0]])

    def result(self) -> list[Tensor]:
        assert self.out is not None
        return [self.out]

    def pull(
        self, chunk: Chunk, grads: list[Tensor], result: list[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        norm, up = result[0][slice(*chunk)], upstream[0][slice(*chunk)]
        scale = torch.where(norm == 0, 0, up / norm)  # the subgradient at zero is zero
        return [(flat(g) * scale.to(g.dtype).unsqueeze(1)).view(g.shape) for g in grads]
