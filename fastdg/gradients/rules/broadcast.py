"""Element-wise operations with an operand that samples share: bias, scale, position table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ...factors import Dense, PerSampleGrad
from ..ownership.layout import Layout, lead
from .registry import RESHAPES, BoundRule, Use, plain, rule


@dataclass(frozen=True)
class Broadcast(BoundRule):
    """Rule for an operand that was broadcast over samples.

    Attributes:
        operation: name of the operation.
        slot: index of the operand.
        layout: layout of the rows along ``over``.
        over: dimensions of the output over which the operand was broadcast.
        parameter: shape of the parameter.
    """

    operation: str
    slot: int
    layout: Layout
    over: tuple[int, ...]
    parameter: tuple[int, ...]

    def saved(self, node: Node) -> tuple[Any, ...]:
        return _WITH[self.operation][self.slot](node)

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        grad = delta
        for other in saved:
            # As in autograd: a product would turn inf into NaN where the operand is not chosen
            chosen = isinstance(other, Tensor) and other.dtype == torch.bool
            grad = grad.where(other, 0) if chosen else grad * other
        kept = [d for d in range(grad.dim()) if d not in self.over]
        rows = grad.permute(*self.over, *kept).flatten(0, len(self.over) - 1)
        return Dense(self.layout.rows(rows).sum(1).reshape(self.layout.samples, *self.parameter))


# Operation -> for each operand, the factors of the output gradient
_WITH: dict[str, tuple[Callable[[Any], tuple[Any, ...]], ...]] = {
    "AddBackward0": (lambda n: (), lambda n: _unless_one(n._saved_alpha)),
    "SubBackward0": (lambda n: (), lambda n: (-n._saved_alpha,)),
    "MulBackward0": (lambda n: (n._saved_other,), lambda n: (n._saved_self,)),
    "DivBackward0": (
        lambda n: (n._saved_other.reciprocal(),),
        lambda n: (-n._saved_self / n._saved_other.square(),),
    ),
    "AddcmulBackward0": (
        lambda n: (),
        lambda n: (n._saved_tensor2, *_unless_one(n._saved_value)),
        lambda n: (n._saved_tensor1, *_unless_one(n._saved_value)),
    ),
    "ExpandBackward0": (lambda n: (),),
    "PreluKernelBackward0": (lambda n: (), lambda n: (n._saved_self.clamp(max=0),)),
    "WhereBackward0": (lambda n: (n._saved_condition,), lambda n: (~n._saved_condition,)),
}


def _unless_one(number: float) -> tuple[float, ...]:
    return () if number == 1 else (number,)


@rule("PreluKernelBackward0", slots=[1])
@rule("ExpandBackward0", slots=[0])
@rule("AddcmulBackward0", slots=[0, 1, 2])
@rule(
    *("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "WhereBackward0"),
    slots=[0, 1],
)
def elementwise(use: Use) -> BoundRule | None:
    if any(name not in RESHAPES for name in plain(use.chain)):
        return None
    dims = len(use.output)
    missing = dims - len(use.shape)
    if missing < 0:
        return None
    over = tuple(d for d in range(dims) if d < missing or use.shape[d - missing] == 1)
    if not over or prod(use.shape) != prod(use.parameter):
        return None
    rows = lead(use.owner, use.output, over)
    if rows is None:
        return None
    layout = Layout.of(rows, use.samples)
    return Broadcast(use.node.name(), use.slot, layout, over, use.parameter)


@dataclass(frozen=True)
class Repeated(BoundRule):
    """Rule for a tensor that was repeated for each sample.

    Attributes:
        layout: layout of the copies.
        sizes: sizes of the output, each dimension split into (repeats, length).
        parameter: shape of the parameter.
    """

    layout: Layout
    sizes: tuple[int, ...]
    parameter: tuple[int, ...]

    def saved(self, node: Node) -> tuple[Any, ...]:
        return ()

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        copies = _copies_first(delta.reshape(self.sizes)).reshape(-1, prod(self.parameter))
        rows = self.layout.rows(copies).sum(1)
        return Dense(rows.reshape(self.layout.samples, *self.parameter))


def _copies_first(x: Tensor) -> Tensor:
    """Permute dimensions (repeats, length, repeats, ...) to all repeats, then all lengths."""
    return x.permute(*range(0, x.dim(), 2), *range(1, x.dim(), 2))


@rule("RepeatBackward0", slots=[0])
def repeat(use: Use) -> BoundRule | None:
    reshaped = all(name in RESHAPES for name in plain(use.chain))
    if not reshaped or prod(use.shape) != prod(use.parameter) or 0 in use.output:
        return None
    dims = len(use.output)
    long = (1,) * (dims - len(use.shape)) + use.shape
    often = tuple(out // n for out, n in zip(use.output, long, strict=True))
    split: list[int] = []  # of the owners, which may have size 1 in a dimension
    for d in range(dims):
        split += (1, 1) if use.owner.shape[d] == 1 else (often[d], long[d])
    owner = _copies_first(use.owner.reshape(split)).flatten(dims)
    if not bool((owner == owner[..., :1]).all()):
        return None
    layout = Layout.of(owner[..., 0].expand(often).reshape(-1), use.samples)
    sizes = tuple(n for pair in zip(often, long, strict=True) for n in pair)
    return Repeated(layout, sizes, use.parameter)
