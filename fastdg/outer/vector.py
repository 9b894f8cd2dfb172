"""A tensor for each parameter, as one vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..distributed.sharding import local
from ..dtypes import to_statistics_dtype

TINY = 1e-12  # keeps a division by a norm finite, as in the authors' code


class Vector:
    """One value for each entry of some parameters; the entries of other parameters are 0.

    Args:
        parts: parameter -> tensor of its shape. Of a parameter that FSDP2 shards, it is the shard.
        ranks: the processes that hold the shards.
    """

    def __init__(self, parts: Mapping[Tensor, Tensor], ranks: Ranks) -> None:
        self.parts, self.ranks = parts, ranks
        self._square: Tensor | None = None

    def dot(self, other: Vector) -> Tensor:
        """Inner product, 0-dim, in float32 or float64."""
        pairs = {p: (x, other.parts[p]) for p, x in self.parts.items() if p in other.parts}
        if not pairs:
            return next(iter(self.parts)).new_zeros((), dtype=torch.float32)
        return self.ranks.sum({p: (_exact(x) * _exact(y)).sum() for p, (x, y) in pairs.items()})

    def square(self) -> Tensor:
        """Squared Euclidean norm, 0-dim, in float32 or float64; computed once."""
        if self._square is None:
            self._square = self.dot(self)
        return self._square

    def norm(self) -> Tensor:
        """Euclidean norm, 0-dim, in float32 or float64."""
        return self.square().sqrt()

    def unit(self) -> Vector:
        """The vector divided by its norm."""
        return self * (1 / (self.norm() + TINY))

    def beside(self, other: Vector) -> Vector:
        """The part that is orthogonal to ``other``; the whole vector where that is 0."""
        square = other.square()
        share = (self.dot(other) / square).where(square > 0, 0.0)
        return self - share * other

    def map(self, function: Callable[[Tensor, Tensor], Tensor]) -> Vector:
        """Compute ``function(parameter, value)`` for each parameter."""
        parts = {p: function(local(p).detach(), _dense(x)) for p, x in self.parts.items()}
        return Vector(parts, self.ranks)

    def __mul__(self, factor: Tensor | float) -> Vector:
        def times(x: Tensor) -> Tensor:
            if not isinstance(factor, Tensor):
                return x * factor
            wide = to_statistics_dtype(x)  # 1 / norm may be more than a float16
            return (wide * factor.to(wide)).to(x.dtype)

        return Vector({p: times(x) for p, x in self.parts.items()}, self.ranks)

    __rmul__ = __mul__

    def __add__(self, other: Vector) -> Vector:
        parts: dict[Tensor, Tensor] = {**self.parts, **other.parts}
        for p, x in self.parts.items():
            if p in other.parts:
                parts[p] = _dense(x) + _dense(other.parts[p])
        return Vector(parts, self.ranks)

    def __sub__(self, other: Vector) -> Vector:
        return self + other * -1.0


def _exact(x: Tensor) -> Tensor:
    return to_statistics_dtype(_dense(x))


def _dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_sparse else x
