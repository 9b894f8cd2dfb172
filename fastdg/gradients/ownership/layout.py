"""Layout of rows: from any order of the samples to ``[N, T, *]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..plain import recorded

Kind = Literal["major", "minor", "any"]


@dataclass(frozen=True)
class Layout:
    """Map of R rows to N samples; the sample with most rows has T.

    Attributes:
        kind: ``"major"``, row r belongs to sample r // T; ``"minor"``, to r % N; ``"any"``,
            by ``index``.
        samples: N.
        positions: T.
        index: ``[N * T]``, the row at each position of each sample; R for no row.
    """

    kind: Kind
    samples: int
    positions: int
    index: Tensor | None

    @classmethod
    def of(cls, owner: Tensor, samples: int) -> Layout:
        """Find the layout of rows with samples ``owner`` ``[R]``; -1: a row without gradient."""
        count = owner.numel()
        place = torch.arange(count, device=owner.device)
        if count % samples == 0:
            positions = count // samples
            if bool((owner == place // positions).all()):
                return cls("major", samples, positions, None)
            if bool((owner == place % samples).all()):
                return cls("minor", samples, positions, None)
        order = torch.argsort(owner, stable=True)
        order = order[owner[order] >= 0]
        sample = owner[order]
        number = torch.bincount(sample, minlength=samples)
        positions = max(1, int(number.max()))
        begin = number.cumsum(0) - number
        slot = sample * positions + torch.arange(len(order), device=order.device) - begin[sample]
        index = torch.full((samples * positions,), count, device=owner.device)
        return cls("any", samples, positions, index.index_copy(0, slot, order))

    @property
    def alone(self) -> bool:
        """Whether each sample has one row, in order."""
        return self.positions == 1 and self.kind == "major"

    def shortest(self, x: Tensor) -> Tensor:
        """Call `rows`, but omit the dimension T of rows that are `alone`."""
        return x if self.alone else self.rows(x)

    def rows(self, x: Tensor) -> Tensor:
        """Rearrange ``x [R, *]`` to ``[N, T, *]``; zeros where a sample has fewer rows."""
        if self.kind == "major":
            if recorded(x):
                return _Unflatten.apply(x, self.samples, self.positions)
            return x.unflatten(0, (self.samples, self.positions))
        if self.kind == "minor":
            return x.unflatten(0, (self.positions, self.samples)).transpose(0, 1)
        assert self.index is not None
        padded = torch.cat([x, x.new_zeros((1, *x.shape[1:]))])
        return padded.index_select(0, self.index).unflatten(0, (self.samples, self.positions))


class _Unflatten(torch.autograd.Function):
    """``x.unflatten(0, (samples, positions))`` whose gradient is no view: autograd adds to it in
    place, but allocates new memory for each sum with a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, samples: int, positions: int) -> Tensor:
        ctx.shape = x.shape
        return x.unflatten(0, (samples, positions))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        found = grad.reshape(ctx.shape)
        return found if torch.is_grad_enabled() else found.data, None, None


def lead(owner: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor | None:
    """Return the samples ``[R]`` of the rows along ``dims`` of a tensor of this shape; None if the
    sample changes along another dimension."""
    if any(owner.shape[d] != 1 for d in range(len(shape)) if d not in dims):
        return None
    sizes = [shape[d] for d in dims]
    chosen = owner.permute(*dims, *(d for d in range(len(shape)) if d not in dims))
    return chosen.reshape([owner.shape[d] for d in dims]).expand(sizes).reshape(math.prod(sizes))
