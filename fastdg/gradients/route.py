"""Where a backward stops at the operations of a plan: the same for all graphs of its signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.autograd.graph import Node

from .graph import Graph, output_shapes
from .plan import Place, Plan
from .release import keeps_tensors

CAUGHT = 1 << 16  # entries of an output gradient that may wait for the end of the backward
WAITING = 1 << 20  # of all that wait; a call of Python for each takes longer than such small ones


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

    @classmethod
    def of(cls, plan: Plan, graph: Graph) -> Route:
        uses: dict[int, list[tuple[int, Place]]] = {}
        for i, places in plan.places.items():
            for place in places:
                uses.setdefault(place.node, []).append((i, place))
        boundaries = (boundary.node for boundary in plan.boundaries if plan.pulled)
        targets = list(dict.fromkeys([*uses, *boundaries]))
        nodes = [graph.nodes[at] for at in targets]
        outputs = {
            at: [nr for nr, shape in enumerate(output_shapes(node)) if shape is not None]
            for at, node in zip(targets, nodes, strict=True)
        }
        covered = graph.above(nodes)
        deepest = [node for node in nodes if node not in covered]
        passed = graph.above(deepest)
        return cls(
            uses,
            {i: len(places) for i, places in plan.places.items()},
            targets,
            outputs,
            frozenset(graph.position[node] for node in deepest),
            _small(targets, nodes),
            [k for k, n in enumerate(graph.nodes) if n not in passed and keeps_tensors(n)],
        )

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


def _small(targets: Sequence[int], nodes: Sequence[Node]) -> frozenset[int]:
    found, waiting = set(), 0
    for at, node in zip(targets, nodes, strict=True):
        size = sum(prod(shape) for shape in output_shapes(node) if shape is not None)
        if size <= CAUGHT and waiting + size <= WAITING:
            waiting += size
            found.add(at)
    return frozenset(found)
