"""Where a backward stops for a plan: the same in all graphs of a signature."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch.autograd.graph import Node

from .derivatives import DERIVED
from .graph import Graph, output_shapes
from .plan import Plan, Route, RuleUse
from .release import keeps_tensors

# A Python hook costs more than keeping a small gradient until the end of the backward
CAUGHT = 1 << 16  # entries of one output gradient that may wait
WAITING = 1 << 20  # entries of all that wait


def route_of(plan: Plan, graph: Graph) -> Route:
    """Compute the route of a plan from one graph of its signature."""
    uses: dict[int, list[tuple[int, RuleUse]]] = {}
    for i, of_parameter in plan.rule_uses.items():
        for use in of_parameter:
            uses.setdefault(use.node, []).append((i, use))
    boundaries = (boundary.node for boundary in plan.boundaries if plan.by_autograd)
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
        {i: len(of_parameter) for i, of_parameter in plan.rule_uses.items()},
        targets,
        outputs,
        frozenset(graph.position[node] for node in deepest),
        _small(targets, nodes),
        [k for k, node in enumerate(graph.nodes) if node in passed or node in deepest],
        [k for k, node in enumerate(graph.nodes) if node in passed and node.name() in DERIVED],
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
