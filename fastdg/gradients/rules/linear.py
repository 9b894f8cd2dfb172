"""Matrix products: the weight's gradient is a sum of outer products of input and delta."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from ...factors import Dense, Outer, PerSampleGrad
from ..ownership.layout import Layout, lead
from .registry import CASTS, RESHAPES, BoundRule, Use, plain, rule


@dataclass(frozen=True)
class Product(BoundRule):
    """Rule for a matrix in a product with rows of samples.

    Attributes:
        layout: layout of the rows.
        saved_as: the attribute of the node that holds the rows.
        columns: whether the rows are columns of the saved tensor and of the delta.
        swapped: whether the parameter is ``[I, O]``, not ``[O, I]``.
        parameter: shape of the parameter.
    """

    layout: Layout
    saved_as: str
    columns: bool
    swapped: bool
    parameter: tuple[int, ...]

    def saved(self, node: Node) -> tuple[Any, ...]:
        return (getattr(node, self.saved_as),)

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        a = saved[0]
        if delta.dim() == 1:
            delta = delta.unsqueeze(1)
        elif self.columns:
            a, delta = a.t(), delta.t()
        elif a.dim() == 3:
            a, delta = a.flatten(0, 1), delta.flatten(0, 1)
        a, delta = self.layout.shortest(a), self.layout.shortest(delta)
        if self.swapped:
            a, delta = delta, a
        return Outer(a, delta, self.parameter)


@dataclass(frozen=True)
class Summed(BoundRule):
    """Rule for a bias that is added to rows of samples."""

    layout: Layout
    parameter: tuple[int, ...]

    def saved(self, node: Node) -> tuple[Any, ...]:
        return ()

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        total, shape = delta, (self.layout.samples, *self.parameter)
        if not self.layout.alone:
            total = self.layout.rows(delta)
            total = total.squeeze(1) if total.shape[1] == 1 else total.sum(1)
        return Dense(total if total.shape == shape else total.reshape(shape))


def _transposed(use: Use) -> bool | None:
    """Whether the operand is the transpose of the parameter; None if it is neither."""
    chain = plain(use.chain)
    transposed = bool(chain) and chain[0] in ("TBackward0", "TransposeBackward0")
    reshapes = chain[1:] if transposed else chain
    if any(name not in RESHAPES for name in reshapes):
        return None
    # A parameter of any shape viewed as a matrix, row by row: (O, C, 1, 1) as (O, C)
    matrix = use.shape[::-1] if transposed else use.shape
    return transposed if prod(use.parameter) == prod(matrix) else None


def _scaled(node: Node) -> bool:
    return any(getattr(node, name, 1) != 1 for name in ("_saved_alpha", "_saved_beta"))


@rule("AddmmBackward0", slots=[2])
@rule("MmBackward0", slots=[1])
def right(use: Use) -> BoundRule | None:
    """``x @ w`` with x ``[R, I]``, w ``[I, O]``."""
    rows = lead(use.owner, use.output, (0,))
    transposed = _transposed(use)
    if rows is None or transposed is None or _scaled(use.node):
        return None
    saved_as = "_saved_mat1" if use.node.name() == "AddmmBackward0" else "_saved_self"
    layout = Layout.of(rows, use.samples)
    return Product(layout, saved_as, False, not transposed, use.parameter)


@rule("MvBackward0", slots=[1])
def vector(use: Use) -> BoundRule | None:
    """``x @ w`` with x ``[R, I]``, w ``[I]``."""
    rows = lead(use.owner, use.output, (0,))
    reshaped = all(name in RESHAPES for name in plain(use.chain))
    if rows is None or not reshaped or prod(use.shape) != prod(use.parameter):
        return None
    return Product(Layout.of(rows, use.samples), "_saved_self", False, False, use.parameter)


@rule("MmBackward0", slots=[0])
def left(use: Use) -> BoundRule | None:
    """``w @ x`` with w ``[O, I]``, x ``[I, R]``."""
    rows = lead(use.owner, use.output, (1,))
    transposed = _transposed(use)
    if rows is None or transposed is None:
        return None
    layout = Layout.of(rows, use.samples)
    return Product(layout, "_saved_mat2", True, transposed, use.parameter)


@dataclass(frozen=True)
class Blocks(BoundRule):
    """Rule for a batch of matrices in products with rows of all samples.

    Attributes:
        layout: layout of the rows.
        saved_as: the attribute of the node that holds the rows.
        columns: whether the rows are columns of the saved tensor and of the delta.
        parameter: shape of the parameter.
    """

    layout: Layout
    saved_as: str
    columns: bool
    parameter: tuple[int, ...]

    def saved(self, node: Node) -> tuple[Any, ...]:
        return (getattr(node, self.saved_as),)

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        # [R, B, I] and [R, B, O]; a matrix on the right is [I, O], so the two swap
        order = (2, 0, 1) if self.columns else (1, 0, 2)
        a, delta = (self.layout.rows(x.permute(order)) for x in (saved[0], delta))
        if not self.columns:
            a, delta = delta, a
        blocks = a.shape[2]
        if blocks == 1:
            return Outer(a.squeeze(2), delta.squeeze(2), self.parameter)
        # As a grouped convolution with a kernel of one position
        a, delta = a.permute(0, 2, 3, 1).flatten(1, 2), delta.flatten(2)
        return Outer(a, delta, self.parameter, (1, 1, 1), blocks)


@rule("BmmBackward0", slots=[0, 1])
def blocks(use: Use) -> BoundRule | None:
    """``x @ w`` and ``w @ x`` with x ``[B, R, I]`` or ``[B, I, R]``, as in einsum."""
    if use.slot == 1 and "ExpandBackward0" in use.chain:
        return batched(use)
    reshaped = all(name in RESHAPES for name in plain(use.chain))
    along = 1 if use.slot == 1 else 2
    rows = lead(use.owner, use.output, (along,))
    if rows is None or not reshaped or prod(use.shape) != prod(use.parameter):
        return None
    saved_as = "_saved_self" if use.slot == 1 else "_saved_mat2"
    return Blocks(Layout.of(rows, use.samples), saved_as, use.slot == 0, use.parameter)


def batched(use: Use) -> BoundRule | None:
    """``x @ w.expand(B, I, O)``, from a linear layer on a non-contiguous tensor."""
    names = [name for name in plain(use.chain) if name not in RESHAPES]
    if names not in (["ExpandBackward0"], ["ExpandBackward0", "TBackward0"]):
        return None
    rows = lead(use.owner, use.output, (0, 1))
    outer = use.chain[: use.chain.index("TBackward0")] if "TBackward0" in names else ()
    if any(name in CASTS or name == "UnsafeViewBackward0" for name in outer):
        return None  # the transpose was copied, and its view may have other rows
    if rows is None or prod(use.parameter) != prod(use.shape[1:]):
        return None
    layout = Layout.of(rows, use.samples)
    return Product(layout, "_saved_self", False, len(names) == 1, use.parameter)


@rule("AddmmBackward0", slots=[0])
def bias(use: Use) -> BoundRule | None:
    """``b + x @ w`` with b ``[O]``."""
    rows = lead(use.owner, use.output, (0,))
    reshaped = any(name not in RESHAPES for name in plain(use.chain))
    if rows is None or reshaped or use.shape[-1:] != use.output[1:] or _scaled(use.node):
        return None
    if prod(use.shape) != use.output[1]:
        return None
    return Summed(Layout.of(rows, use.samples), use.parameter)
