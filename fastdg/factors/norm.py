"""Per-sample gradients of a norm's weight and bias that wait to be computed with other norms'."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from .. import ops
from ..dtypes import to_operand_dtype
from ..ops.norm_gradients import dtype_of
from .base import Dense


class NormCall:
    """A call of `ops.norm_gradients` to come; arguments as there."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        own: bool,
        eps: float | None,
    ) -> None:
        self.maps, self.statistics = (x, delta), (mean, rstd)
        self.own, self.eps, self.dtype = own, eps, dtype_of(x, delta)
        self.bytes = sum(t.numel() * t.element_size() for t in self.maps)
        self.made: tuple[Tensor, Tensor] | None = None

    def result(self) -> tuple[Tensor, Tensor]:
        """Compute both gradients, unless another call did so with its own."""
        if self.made is None:
            compute([self])
        assert self.made is not None
        return self.made


def compute(calls: Sequence[NormCall]) -> None:
    """Compute the results of calls together, and free the maps that they hold."""
    alike: dict[object, list[NormCall]] = {}
    for call in calls:
        if call.made is None:
            kind = call.dtype, call.statistics[0] is None, call.eps is None
            alike.setdefault(kind, []).append(call)
    for group in alike.values():
        first = group[0]
        with torch.no_grad():
            if len(group) == 1:
                found = [
                    ops.norm_gradients(*first.maps, *first.statistics, own=first.own, eps=first.eps)
                ]
            else:
                x, delta = zip(*(call.maps for call in group), strict=True)
                mean, rstd = zip(*(call.statistics for call in group), strict=True)
                means = [m for m in mean if m is not None]
                eps = [call.eps for call in group if call.eps is not None]
                found = list(
                    zip(*ops.foreach_norm_gradients(x, delta, means, rstd, eps), strict=True)
                )
        for call, made in zip(group, found, strict=True):
            call.made = made
            del call.maps, call.statistics


class OfNorm(Dense):
    """Gradients of a norm's weight or bias, which a `NormCall` computes when they are read.

    Args:
        call: computes the weight's and the bias's.
        bias: whether this is the bias.
        rows: shape of the gradients, ``(N, *shape)``.
    """

    def __init__(self, call: NormCall, bias: bool, rows: Sequence[int]) -> None:
        self.call, self.bias = call, bias
        self.samples, *self.shape = rows

    @cached_property
    def grads(self) -> Tensor:  # type: ignore[override]
        found = self.call.result()[self.bias]
        return to_operand_dtype(found.reshape(self.samples, *self.shape))

    @property
    def entries(self) -> int:
        """Number of entries of ``grads``."""
        return self.samples * prod(self.shape)

    def computed(self) -> Dense:
        return Dense(self.grads)
