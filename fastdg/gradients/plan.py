"""How each parameter of a graph is served: boundaries, rules, and what no rule knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .rules.registry import Served

# One input, one output (or several parts of it), and nothing but entries moved or cast
MOVES = frozenset(
    f"{name}Backward{number}"
    for name in (
        *("T", "View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Unsqueeze"),
        *("Squeeze", "ToCopy", "Alias", "Clone", "Slice", "Select", "Split", "SplitWithSizes"),
        *("Unbind", "Diagonal", "AsStrided"),
    )
    for number in range(6)
)

# They may repeat a tensor for each sample, or a weight for each product of a batch
COPIES = frozenset({"ExpandBackward0", "RepeatBackward0"})


@dataclass(frozen=True)
class Place:
    """One use of a parameter that a rule serves."""

    node: int
    served: Served
    operation: str


@dataclass(frozen=True)
class Boundary:
    """Where a tensor that no rule knows meets samples.

    Attributes:
        node: position of the operation in the graph.
        slots: the inputs that the parameters reach.
        served: the rule that makes the per-sample gradients of the tensor at each slot, if any.
        owners: sample of each entry of the gradient at each output; None without a gradient.
        operation: its name.
        mixed: whether the samples were found mixed below it.
    """

    node: int
    slots: tuple[int, ...]
    served: tuple[Served | None, ...]
    owners: tuple[Tensor | None, ...]
    operation: str
    mixed: bool


@dataclass(frozen=True)
class Route:
    """Places in the graph of what a backward has to do with.

    Attributes:
        uses: node -> each parameter that a rule serves there, and how.
        parts: parameter -> at how many places it is used.
        targets: the operations whose output gradients are wanted.
        outputs: of each, the outputs that have gradients.
        last: those with no other target below them: a backward to these passes all others.
        small: those whose output gradients are so small that they may wait for its end.
        idle: nodes that a backward to ``last`` does not run, and that have saved tensors.
    """

    uses: dict[int, list[tuple[int, Place]]]
    parts: dict[int, int]
    targets: list[int]
    outputs: dict[int, list[int]]
    last: frozenset[int]
    small: frozenset[int]
    idle: list[int]

    def rows(self, grads: Sequence[Tensor | None]) -> dict[int, list[Tensor | None]]:
        """Gradients at the ``outputs`` of ``last``, in their order, as lists with a place for each
        output of the operation."""
        found: dict[int, list[Tensor | None]] = {}
        rest = iter(grads)
        for at in self.last:
            found[at] = [None] * (1 + max(self.outputs[at], default=-1))
            for nr in self.outputs[at]:
                found[at][nr] = next(rest)
        return found


@dataclass
class Plan:
    """How the parameters of all graphs of one signature are served.

    Attributes:
        places: position of a parameter -> its uses, where a rule knows all of them.
        pulled: positions of the other parameters that the graph reaches.
        boundaries: of these, all together.
        owners: the sample of each entry of the output gradients at the uses and boundaries, which
            are known by position and number of the output.
        dynamic: whether values choose or mix rows above a use, so that the next graph of the same
            signature may be another.
        zero: whether a gradient was zero at a use, everywhere or in rows that no pattern fills, so
            that its samples are not known: its own gradients may not be zero.
        silent: whether a gradient that was zero or unreadable, at least in part, left something
            unknown.
    """

    places: dict[int, list[Place]] = field(default_factory=dict)
    pulled: list[int] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)
    owners: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    dynamic: bool = False
    zero: bool = False
    silent: bool = False
    route: Route | None = None  # of a backward, made by the first one (`route_of`)

    @property
    def slow(self) -> list[Boundary]:
        """The boundaries whose operation is called once for each domain or sample, or below which
        the samples are mixed."""
        return [b for b in self.boundaries if b.mixed or None in b.served]
