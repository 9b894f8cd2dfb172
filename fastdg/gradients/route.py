"""Where a backward stops at the operations of a plan: the same for all graphs of its signature."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch.autograd.graph import Node

from .graph import Graph, output_shapes
from .plan import Place, Plan, Route
from .release import keeps_tensors

CAUGHT = 1 << 16  # entries of an output gradient that may wait for the end of the backward
WAITING = 1 << 20  # of all that wait; a call of Python for each takes longer than such small ones


def route_of(plan: Plan, graph: Graph) -> Route:
    """The route of a plan, from one graph of its signature."""
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
    return Route(
        uses,
        {i: len(places) for i, places in plan.places.items()},
        targets,
        outputs,
        frozenset(graph.position[node] for node in deepest),
        _small(targets, nodes),
        [k for k, n in enumerate(graph.nodes) if n not in passed and keeps_tensors(n)],
    )


def _small(targets: Sequence[int], nodes: Sequence[Node]) -> frozenset[int]:
    found, waiting = set(), 0
    for at, node in zip(targets, nodes, strict=True):
        size = sum(prod(shape) for shape in output_shapes(node) if shape is not None)
        if size <= CAUGHT and waiting + size <= WAITING:
            waiting += size
            found.add(at)
    return frozenset(found)
