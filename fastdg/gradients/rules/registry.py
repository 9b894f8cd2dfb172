"""Fast ways for known operations: from an output gradient to a parameter's per-sample gradients.

A rule looks at one use of a parameter, when the graph is planned, and returns a `Served` or None.
A rule is never needed for the result: without one, `pulled` calls the operation's own backward once
for each domain or sample. Its test is that it equals that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..._torch import function_of
from ...factors import PerSampleGrad
from ..ownership.layout import Layout, lead


@dataclass(frozen=True)
class Use:
    """One use of a parameter by an operation whose output gradient belongs to samples.

    Attributes:
        node: the operation.
        slot: which of its inputs the parameter, or a view or a cast of it, is.
        chain: names of the operations between the parameter and that input, outermost first.
        shape: of that input.
        owner: sample of each entry of the gradient at output 0, broadcastable to it.
        output: shape of output 0.
        samples: N.
        parameter: shape of the parameter.
    """

    node: Node
    slot: int
    chain: tuple[str, ...]
    shape: tuple[int, ...]
    owner: Tensor
    output: tuple[int, ...]
    samples: int
    parameter: tuple[int, ...]


class Served(ABC):
    """How one use is served. Holds sizes and row maps, no node and no activation."""

    layout: Layout

    @abstractmethod
    def saved(self, node: Node) -> tuple[Any, ...]:
        """The tensors of the forward that `factor` wants, read before the backward frees them."""

    @abstractmethod
    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        """The per-sample gradients of the parameter, of the shape of the parameter."""

    def factor_beside(
        self, node: Node, saved: tuple[Any, ...], delta: Tensor, made: dict[str, Any]
    ) -> PerSampleGrad:
        """`factor`, with what the rules of the other inputs of ``node`` leave to one another."""
        return self.factor(node, saved, delta)


Rule = Callable[[Use], Served | None]
RULES: dict[tuple[str | type, int], Rule] = {}  # by a node's name, or its autograd.Function
_registered = 0  # rules of users, so that no plan made without one is remembered
R = TypeVar("R", bound=Rule)
F = TypeVar("F", bound=Callable[[Any, Tensor], PerSampleGrad])


@dataclass(frozen=True)
class Registered(Served):
    """One input of an operation that a user's function serves."""

    layout: Layout
    function: Callable[[Any, Tensor], PerSampleGrad]

    def saved(self, node: Node) -> tuple[Any, ...]:
        return (_Read(node),)

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        return self.function(saved[0], delta)


class _Read:
    """A graph node whose saved values were read before the backward, which may free them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        for name in dir(node):
            if name == "saved_tensors" or name.startswith("_saved_"):
                setattr(self, name, getattr(node, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


def register_rule(operation: str | type[torch.autograd.Function], *, slot: int) -> Callable[[F], F]:
    r"""Register how per-sample gradients of an operation's input are made (decorator).

    Without a rule they are right, too; a rule replaces one call of the operation's backward for
    each domain (sample) by whatever it does. It serves an input that is a parameter, or made from
    parameters, where dimension 0 of the result counts the samples.

    Args:
        operation: a `torch.autograd.Function`, or the name of a graph node, as
            ``tensor.grad_fn.name()`` shows it.
        slot: which input of the operation that is, from 0.

    The function ``rule(node, delta)`` is given the graph node, with what the forward saved
    (``node.saved_tensors`` of a `torch.autograd.Function`), and the gradient of ``losses.sum()``
    at the result. It returns the gradients in the cheapest form: `Outer`, `Lookup` or `Dense`.

    Raises:
        TypeError: an argument is not as described.

    Example:
        >>> @fastdg.register_rule(Scale, slot=1)      # Scale.apply(x, gain), x (N, C)
        ... def scale(node, delta):
        ...     (x,) = node.saved_tensors
        ...     return fastdg.Dense(delta * x)
    """
    function_class = isinstance(operation, type) and issubclass(operation, torch.autograd.Function)
    if not (function_class or isinstance(operation, str)):
        raise TypeError(
            "operation: expected a torch.autograd.Function or the name of a graph node, got "
            f"{operation!r}"
        )

    def register(function: F) -> F:
        def made(use: Use) -> Served | None:
            rows = lead(use.owner, use.output, (0,))
            if rows is None or use.chain:
                return None
            layout = Layout.of(rows, use.samples)
            whole = layout.kind == "major" and layout.positions == 1
            return Registered(layout, function) if whole else None

        global _registered
        RULES[operation, slot] = made
        _registered += 1
        return function

    return register


CASTS = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0")
RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0")


def rule(*operations: str, slots: Sequence[int]) -> Callable[[R], R]:
    """Register a rule for these operations' inputs (decorator)."""

    def register(made: R) -> R:
        for name in operations:
            for slot in slots:
                RULES[name, slot] = made
        return made

    return register


def serve(use: Use) -> Served | None:
    """What serves this use, or None."""
    made = RULES.get((function_of(use.node), use.slot))
    made = made or RULES.get((use.node.name(), use.slot))
    return None if made is None else made(use)


def registered() -> int:
    """How many rules users have registered so far."""
    return _registered


def plain(chain: Sequence[str]) -> tuple[str, ...]:
    """The chain without casts."""
    return tuple(name for name in chain if name not in CASTS)
