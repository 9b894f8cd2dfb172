"""Per-sample gradients that are sums of outer products: weights of linear maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..domains import Partition
from ..dtypes import to_operand_dtype, to_statistics_dtype
from ..ops.window import unfold
from .base import Agreement, Dense, PerSampleGrad, shaped

CACHED = 1 << 15  # entries that stay in a core's cache
FEW_TILES = 1 << 22  # entries of a weight whose tiles fill no GPU well; those of D weights do


class Outer(PerSampleGrad):
    r"""Weights of linear maps: :math:`g_i = \sum_t \delta_{it} \otimes a_{it}`.

    Args:
        a: layer inputs ``[N, T, I]``, or ``[N, I]``; with ``window`` a padded convolution input
            ``[N, C, *S]``.
        delta: gradients at the outputs, ``[N, T, O]``, or ``[N, O]``. If both are bfloat16, or both
            float16, they are multiplied as they are; statistics are float32.
        shape: shape of the weight; its numel is ``O * I / groups``.
        window: ``[*kernel, *stride, *dilation]`` of a convolution, and ``*padding`` if ``a`` lacks
            it, or empty.
        groups: groups of a convolution, computed as further domains.
    """

    def __init__(
        self,
        a: Tensor,
        delta: Tensor,
        shape: Sequence[int],
        window: Sequence[int] = (),
        groups: int = 1,
    ) -> None:
        a, delta = to_operand_dtype(a), to_operand_dtype(delta)
        if a.dtype != delta.dtype:
            a, delta = to_statistics_dtype(a), to_statistics_dtype(delta)
        if a.dtype != delta.dtype:
            a, delta = a.double(), delta.double()
        self.factors = a, delta  # without T if the arguments have none
        self.shape, self.samples = tuple(shape), a.shape[0]
        self.window, self.groups = list(window), groups

    @property
    def a(self) -> Tensor:
        a, _ = self.factors
        return a.unsqueeze(1) if a.dim() == 2 else a

    @property
    def delta(self) -> Tensor:
        _, delta = self.factors
        return delta.unsqueeze(1) if delta.dim() == 2 else delta

    def _grouped(self) -> tuple[Tensor, Tensor]:
        """``a`` and ``delta`` with one row for each (sample, group)."""
        if self.groups == 1:
            return self.a, self.delta
        a = self.a.unflatten(1, (self.groups, -1)).flatten(0, 1)
        delta = self.delta.transpose(1, 2).unflatten(1, (self.groups, -1)).flatten(0, 1)
        return a, delta.transpose(1, 2)

    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        blocks = partition.grouped(self.groups)
        # Without T where it is missing: the gradient of a view is added to others in new memory
        factors = self.factors if self.groups == 1 else self._grouped()
        mean, variance = ops.outer_moments(*factors, blocks.order, blocks.offsets, self.window)
        shape = (partition.num_domains, *self.shape)
        return shaped(mean, shape), shaped(variance, shape)

    def domain(self, partition: Partition) -> Tensor:
        blocks = partition.grouped(self.groups)
        mean = ops.outer_domain(*self._grouped(), blocks.order, blocks.offsets, self.window)
        return mean.view(partition.num_domains, *self.shape)

    def gram(self, partition: Partition) -> Tensor:
        if self.groups > 1:
            return super().gram(partition)
        return ops.outer_gram(self.a, self.delta, partition.order, partition.offsets, self.window)

    def forms_domains(self, domains: int) -> bool:
        # On the CPU, for small D * numel, forming all domains first is up to three times faster
        # with thousands of samples. With many groups, the weight is small
        entries = math.prod(self.shape)
        few = domains * entries <= CACHED if self.delta.is_cpu else entries <= FEW_TILES
        return few or self.groups > domains

    def agreement(
        self, partition: Partition, weights: Tensor, threshold: float, steepness: float
    ) -> Agreement:
        if self.forms_domains(partition.num_domains):
            return super().agreement(partition, weights, threshold, steepness)
        where = partition.order, partition.offsets
        parts = [
            ops.outer_agreement(a, delta, *where, weights, threshold, steepness, self.window)
            for a, delta in zip(
                self.a.chunk(self.groups, 1) if self.groups > 1 else [self.a],
                self.delta.chunk(self.groups, 2),
                strict=True,
            )
        ]
        combined, agreeing, magnitude = zip(*parts, strict=True)
        if len(parts) == 1:
            return Agreement(combined[0].view(self.shape), agreeing[0], magnitude[0])
        return Agreement(
            torch.cat(combined).view(self.shape),
            torch.stack(agreeing).sum(),
            torch.stack(magnitude).sum(),
        )

    def per_sample(self) -> Tensor:
        a, delta = map(to_statistics_dtype, self._grouped())  # products in halves are rounded
        grads = torch.bmm(delta.transpose(1, 2), unfold(a, self.window))
        return grads.reshape(self.samples, *self.shape)

    def products(self, directions: Tensor) -> Tensor:
        if self.groups > 1:
            return super().products(directions)
        a = to_statistics_dtype(unfold(self.a, self.window))
        delta = to_statistics_dtype(self.delta)
        weights = directions.to(a.dtype).reshape(len(directions), delta.shape[2], a.shape[2])
        found = [((a @ weight.t()) * delta).sum((1, 2)) for weight in weights]
        return torch.stack(found, 1)

    def sample_gram(self) -> Tensor:
        if self.groups > 1 or self.window or self.a.shape[1] > 1:
            return super().sample_gram()
        a, delta = (to_statistics_dtype(x.squeeze(1)) for x in (self.a, self.delta))
        return (a @ a.t()) * (delta @ delta.t())

    def norms(self) -> Tensor:
        return ops.outer_norms(*self._grouped(), self.window).view(self.samples, -1).sum(1)

    def scaled(self, weights: Tensor) -> PerSampleGrad:
        delta = to_statistics_dtype(self.delta)  # a product with a weight would be rounded
        delta = delta * weights.to(delta.dtype).view(-1, 1, 1)
        return Outer(self.a, delta, self.shape, self.window, self.groups)

    def take(self, number: slice) -> PerSampleGrad:
        return Outer(self.a[number], self.delta[number], self.shape, self.window, self.groups)

    def _rows(self) -> Outer:
        """Unfold the window: the patches become rows."""
        if not self.window:
            return self
        return Outer(unfold(self.a, self.window), self.delta, self.shape)

    def fold(self, samples: int) -> PerSampleGrad:
        if self.groups > 1:
            return Dense(self.per_sample()).fold(samples)
        rows = self._rows()
        a, delta = (x.unflatten(0, (samples, -1)).flatten(1, 2) for x in (rows.a, rows.delta))
        return Outer(a, delta, self.shape)

    def plus(self, other: PerSampleGrad) -> PerSampleGrad:
        if not isinstance(other, Outer) or self.groups > 1 or other.groups > 1:
            return super().plus(other)
        one, two = self._rows(), other._rows()
        return Outer(torch.cat([one.a, two.a], 1), torch.cat([one.delta, two.delta], 1), self.shape)
