"""The autograd graph below some tensors: nodes, consumers, leaves and a signature."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._torch import metadata_of

# Saved attributes that decide the place of rows or the choice of a rule. The signature also has the
# shapes of all gradients.
_DIM = ("_saved_dim",)
_LAYOUT: dict[str, tuple[str, ...]] = {
    "SplitWithSizesBackward0": ("_saved_dim", "_saved_split_sizes"),
    "SplitBackward0": ("_saved_dim", "_saved_split_size"),
    "SliceBackward0": ("_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
    "SelectBackward0": ("_saved_dim", "_saved_index"),
    "PermuteBackward0": ("_saved_dims",),
    "TransposeBackward0": ("_saved_dim0", "_saved_dim1"),
    "FlipBackward0": ("_saved_dims",),
    "RollBackward0": ("_saved_shifts", "_saved_dims"),
    "ConstantPadNdBackward0": ("_saved_pad",),
    "DiagonalBackward0": ("_saved_offset", "_saved_dim1", "_saved_dim2"),
    "NativeBatchNormBackward0": ("_saved_training",),
    "CudnnBatchNormBackward0": ("_saved_training",),
    "NativeLayerNormBackward0": ("_saved_normalized_shape",),
    "FusedRmsNormBackward0": ("_saved_normalized_shape",),
    "EmbeddingBackward0": ("_saved_scale_grad_by_freq", "_saved_sparse"),
    "EmbeddingBagBackward0": ("_saved_mode", "_saved_scale_grad_by_freq", "_saved_sparse"),
    "AddmmBackward0": ("_saved_alpha", "_saved_beta"),
    "NllLossBackward0": ("_saved_reduction",),
    **dict.fromkeys(("UnbindBackward0", "CatBackward0", "StackBackward0", "GluBackward0"), _DIM),
    **dict.fromkeys(("SoftmaxBackward0", "LogSoftmaxBackward0", "CumsumBackward0"), _DIM),
    "SafeSoftmaxBackward0": _DIM,
    **dict.fromkeys(("SumBackward1", "MeanBackward1", "AmaxBackward0", "AminBackward0"), _DIM),
    **dict.fromkeys(("LogsumexpBackward0", "LinalgVectorNormBackward0", "ProdBackward1"), _DIM),
    **dict.fromkeys(("VarBackward0", "StdBackward0", "VarMeanBackward0", "StdMeanBackward0"), _DIM),
    **dict.fromkeys(("MaxBackward0", "MinBackward0", "MedianBackward1"), _DIM),
    **dict.fromkeys(("NormBackward1", "NormBackward3"), _DIM),
}
# Operations with one result, whose shape follows from the inputs' shapes
_SHAPED_BY_INPUTS = frozenset(
    f"{name}Backward{number}"
    for name in (
        *("T", "Alias", "Clone", "ToCopy", "Neg", "Relu", "Gelu", "Silu", "Elu", "LeakyRelu"),
        *("Hardtanh", "Hardswish", "Hardsigmoid", "Tanh", "Sigmoid", "Softplus", "NativeDropout"),
        *("LogSoftmax", "Softmax", "SafeSoftmax", "Add", "Sub", "Mul", "Div", "Mm", "Bmm", "Addmm"),
        "NllLoss",
    )
    for number in range(2)
)


class _Kind(NamedTuple):
    """Facts about all nodes of one class, for the structure of a graph.

    Attributes:
        saved: node -> saved attributes that belong to the structure; None: it has none.
        shaped: whether the inputs' shapes determine the output's shape.
    """

    saved: Callable[[Node], Hashable] | None
    shaped: bool

    @classmethod
    def of(cls, node: Node) -> _Kind:
        name = node.name()
        saved = [key for key in _LAYOUT.get(name, ()) if hasattr(node, key)]
        return cls(attrgetter(*saved) if saved else None, name in _SHAPED_BY_INPUTS)


# By weak reference: a class made by a user or torch.compile keeps its own data alive
_kinds: dict[ref[type], _Kind] = {}
_END = -2


def output_shapes(node: Node) -> tuple[Any, ...]:
    """Return the shape of each output of the operation, or None."""
    metadata = metadata_of(node)
    return tuple(None if m is None else tuple(m.shape) for m in metadata)


def output_dtypes(node: Node) -> tuple[torch.dtype | None, ...]:
    """Return the dtype of each output of the operation, or None."""
    metadata = metadata_of(node)
    return tuple(None if m is None else m.dtype for m in metadata)


def signed(number: int) -> int:
    """Convert a saved integer: torch shows negative ones as large unsigned numbers."""
    return number if number < 1 << 63 else number - (1 << 64)


def moves_nothing(node: Node) -> bool:
    """Whether the node transposes a dimension with itself."""
    if node.name() != "TransposeBackward0":
        return False
    (shape,) = output_shapes(node)
    a, b = signed(node._saved_dim0), signed(node._saved_dim1)  # type: ignore[attr-defined]
    return shape is not None and (a - b) % len(shape) == 0


class Key:
    """Dictionary key that computes the hash of its values once."""

    __slots__ = ("_hash", "values")

    def __init__(self, *values: Any) -> None:
        self.values = values
        self._hash = hash(values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.values == other.values


class Graph:
    """The nodes below ``root`` in breadth-first order, the same for two equal graphs.

    Attributes:
        nodes: every node once, ``root`` first.
        position: node -> index in ``nodes``.
        leaves: id of a tensor -> node that accumulates its gradient.
    """

    def __init__(self, root: Node) -> None:
        self.nodes = [root]
        self.position = {root: 0}
        self.leaves: dict[int, Node] = {}
        # For each node: position and output number of each node that feeds it, then _END
        self._edges: list[int] = []
        # For each node: the shape of its leaf, or whether nodes feed all its inputs
        self._below: list[tuple[int, ...] | bool] = []
        nodes, position, edges = self.nodes, self.position, self._edges
        for node in nodes:  # grows while we walk it
            below = node.next_functions
            found: tuple[int, ...] | bool = True
            if not below and (variable := getattr(node, "variable", None)) is not None:
                self.leaves[id(variable)] = node
                found = variable.shape
            for child, nr in below:
                if child is None:
                    place, found = -1, False
                elif (place := position.get(child, -1)) < 0:
                    place = position[child] = len(nodes)
                    nodes.append(child)
                edges.append(place)
                edges.append(nr)
            edges.append(_END)
            self._below.append(found)

    @cached_property
    def consumers(self) -> dict[Node, list[tuple[Node, int, int]]]:
        """Node -> ``(consumer, slot, output_nr)`` for each operation input that reads an output of
        the node."""
        found: dict[Node, list[tuple[Node, int, int]]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for slot, (child, nr) in enumerate(node.next_functions):
                if child is not None:
                    found[child].append((node, slot, nr))
        return found

    @cached_property
    def structure(self) -> Key:
        """Key that is equal for graphs with the same operations, shapes and saved sizes."""
        kinds = tuple(map(ref, map(type, self.nodes)))
        sizes: list[Hashable] = []
        for node, kind, below in zip(self.nodes, kinds, self._below, strict=True):
            if isinstance(below, tuple):  # ten times as fast as the shapes of nodes
                sizes.append(below)
                continue
            if (known := _kinds.get(kind)) is None:
                known = _kinds[kind] = _Kind.of(node)
            if not (below and known.shaped):
                sizes += output_shapes(node)
            if known.saved is not None:
                sizes.append(known.saved(node))
            sizes.append(_END)
        return Key(tuple(self._edges), kinds, tuple(sizes))

    def signature(self, parameters: Sequence[Tensor]) -> Hashable:
        """Return a key, equal for graphs of one `structure` with parameters in the same places."""
        position, leaves = self.position, self.leaves
        nodes = [leaves.get(id(p)) for p in parameters]
        return self.structure, tuple([-1 if node is None else position[node] for node in nodes])

    def above(self, nodes: Iterable[Node]) -> dict[Node, None]:
        """Return all nodes that the gradients at ``nodes`` depend on, in a fixed order. One of
        ``nodes`` is in it only if it is above another."""
        covered: dict[Node, None] = {}
        pending = list(nodes)
        for node in pending:  # grows while we walk it
            for consumer, _, _ in self.consumers[node]:
                if consumer not in covered:
                    covered[consumer] = None
                    pending.append(consumer)
        return covered


# Products of a weight and another tensor
_PRODUCTS = frozenset(
    f"{name}Backward0" for name in ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Embedding")
)


def holds_samples(node: Node, samples: int) -> bool:
    """Whether an operation's result depends on samples, not on parameters alone (a weight-normed
    weight), as far as shapes tell: below it are a product with a constant and a tensor with a
    dimension as long as the batch."""
    found = [node]
    seen = set(found)
    product = long = False
    for below in found:  # grows while we walk it
        children = [child for child, _ in below.next_functions]
        constant = None in children or len(children) == 1
        product |= below.name() in _PRODUCTS and constant
        long |= any(shape is not None and samples in shape for shape in output_shapes(below))
        if product and long:
            return True
        more = [child for child in children if child is not None and child not in seen]
        seen.update(more)
        found += more
    return False
