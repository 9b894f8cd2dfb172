"""The plan for the parameters of a graph: rules and boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from .rules.registry import BoundRule

# One input, one output (or several parts of it); entries are only moved or cast
MOVES = frozenset(
    f"{name}Backward{number}"
    for name in (
        *("T", "View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Unsqueeze"),
        *("Squeeze", "ToCopy", "Alias", "Clone", "Slice", "Select", "Split", "SplitWithSizes"),
        *("Unbind", "Diagonal", "AsStrided"),
    )
    for number in range(6)
)

# May repeat a tensor for each sample, or a weight for each product of a batch
COPIES = frozenset({"ExpandBackward0", "RepeatBackward0"})


@dataclass(frozen=True)
class RuleUse:
    """One use of a parameter with a rule."""

    node: int
    rule: BoundRule
    operation: str


@dataclass(frozen=True)
class Boundary:
    """Operation where a tensor without a rule meets samples.

    Attributes:
        node: position of the operation in the graph.
        slots: inputs that depend on the parameters.
        rules: rule for the per-sample gradients of the tensor at each slot, or None.
        owners: sample of each entry of the gradient at each output; None without a gradient.
        operation: name of the operation.
        mixed: whether samples are mixed below it.
    """

    node: int
    slots: tuple[int, ...]
    rules: tuple[BoundRule | None, ...]
    owners: tuple[Tensor | None, ...]
    operation: str
    mixed: bool


@dataclass(frozen=True)
class Route:
    """Positions in the graph that a backward uses.

    Attributes:
        uses: node -> parameters with a rule at this node, and these uses.
        parts: parameter -> number of its uses.
        targets: operations whose output gradients are needed.
        outputs: target -> outputs with gradients.
        last: targets without another target below; a backward to these passes all others.
        small: targets with output gradients small enough to keep until the end of the backward.
        passed: operations with gradients that a backward to ``last`` computes, ``last`` too.
        derived: operations with a derivative of ours that a backward to ``last`` runs.
        idle: nodes with saved tensors that a backward to ``last`` does not run.
    """

    uses: dict[int, list[tuple[int, RuleUse]]]
    parts: dict[int, int]
    targets: list[int]
    outputs: dict[int, list[int]]
    last: frozenset[int]
    small: frozenset[int]
    passed: list[int]
    derived: list[int]
    idle: list[int]

    def rows(self, grads: Sequence[Tensor | None]) -> dict[int, list[Tensor | None]]:
        """Group gradients at the ``outputs`` of ``last``, in this order, into one list per node
        with an element for each output."""
        found: dict[int, list[Tensor | None]] = {}
        gradient = iter(grads)
        for at in self.last:
            found[at] = [None] * (1 + max(self.outputs[at], default=-1))
            for nr in self.outputs[at]:
                found[at][nr] = next(gradient)
        return found


@dataclass
class Plan:
    """How gradients are computed in all graphs of one signature.

    Attributes:
        rule_uses: position of a parameter -> its uses, if all have a rule.
        by_autograd: positions of the other parameters in the graph.
        boundaries: boundaries of the parameters in ``by_autograd``.
        owners: (position, output) of a use or boundary -> sample of each entry of its gradient.
        dynamic: whether values choose or mix rows above a use, so the next graph of this signature
            may need another plan.
        zero: whether a gradient at a use was zero, everywhere or in rows that no pattern fills, so
            its samples are unknown; its derivative may not be zero.
        silent: whether samples are unknown because a gradient was zero or unreadable, at least in
            part.
    """

    rule_uses: dict[int, list[RuleUse]] = field(default_factory=dict)
    by_autograd: list[int] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)
    owners: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    dynamic: bool = False
    zero: bool = False
    silent: bool = False
    route: Route | None = None  # made by the first backward (`route_of`)

    @cached_property
    def lookups(self) -> list[tuple[int, int]]:
        """Position of a parameter and of the node, for each use in an embedding."""
        return [
            (i, use.node)
            for i, uses in self.rule_uses.items()
            for use in uses
            if use.operation.startswith("Embedding")
        ]

    @cached_property
    def slow(self) -> list[Boundary]:
        """Boundaries that need one call per domain or sample, or have mixed samples below."""
        return [b for b in self.boundaries if b.mixed or None in b.rules]
