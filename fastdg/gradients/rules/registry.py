"""Rules for known operations: from an output gradient to a parameter's per-sample gradients.

When a graph is planned, a rule gets one use of a parameter and returns a `BoundRule` or None.
Results never depend on a rule: without one, `by_autograd` calls the operation's own backward once
for each domain or sample. The test of a rule compares both.
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
        slot: the input that is the parameter, or a view or a cast of it.
        chain: names of the operations between the parameter and this input, outermost first.
        shape: shape of this input.
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


class BoundRule(ABC):
    """Rule for one use. Holds sizes and row maps, no node and no activation."""

    layout: Layout

    @abstractmethod
    def saved(self, node: Node) -> tuple[Any, ...]:
        """Read the saved tensors that `factor` needs, before the backward frees them."""

    @abstractmethod
    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        """Compute the per-sample gradients, of the shape of the parameter."""

    def factor_beside(
        self, node: Node, saved: tuple[Any, ...], delta: Tensor, made: dict[str, Any]
    ) -> PerSampleGrad:
        """Compute `factor`; the rules of the inputs of ``node`` share results in ``made``."""
        return self.factor(node, saved, delta)


Rule = Callable[[Use], BoundRule | None]
RULES: dict[tuple[str | type, int], Rule] = {}  # by a node's name, or its autograd.Function
_registered = 0  # number of users' rules; part of the key of a plan
R = TypeVar("R", bound=Rule)
F = TypeVar("F", bound=Callable[[Any, Tensor], PerSampleGrad])


@dataclass(frozen=True)
class Registered(BoundRule):
    """Rule from a user's function, for one input of an operation."""

    layout: Layout
    function: Callable[[Any, Tensor], PerSampleGrad]

    def saved(self, node: Node) -> tuple[Any, ...]:
        return (_Read(node),)

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        return self.function(saved[0], delta)


class _Read:
    """Graph node with its saved values, read before the backward may free them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        for name in dir(node):
            if name == "saved_tensors" or name.startswith("_saved_"):
                setattr(self, name, getattr(node, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


def register_rule(operation: str | type[torch.autograd.Function], *, slot: int) -> Callable[[F], F]:
    r"""Register a rule for the per-sample gradients of an operation's input (decorator).

    Results are correct without a rule; a rule replaces one call of the operation's backward per
    domain (or sample). It applies to an input that is a parameter, or computed from parameters, if
    dimension 0 of the result is the sample.

    Args:
        operation: a `torch.autograd.Function`, or the name of a graph node, as
            ``tensor.grad_fn.name()`` shows it.
        slot: index of the input, from 0.

    The function ``rule(node, delta)`` gets the graph node with its saved tensors
    (``node.saved_tensors`` of a `torch.autograd.Function`) and the gradient of ``losses.sum()`` at
    the result. It returns the gradients in the cheapest form: `Outer`, `Lookup` or `Dense`.

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
            f"{operation!r}."
        )

    def register(function: F) -> F:
        def made(use: Use) -> BoundRule | None:
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


def rule_for(use: Use) -> BoundRule | None:
    """Return the rule's result for this use, or None."""
    made = RULES.get((function_of(use.node), use.slot))
    made = made or RULES.get((use.node.name(), use.slot))
    return None if made is None else made(use)


def registered() -> int:
    """Return the number of rules that users have registered."""
    return _registered


def plain(chain: Sequence[str]) -> tuple[str, ...]:
    """Return the chain without casts."""
    return tuple(name for name in chain if name not in CASTS)
