"""Samples of rows by the operations alone, for all values.

A map of rows to samples can be cached only if it does not depend on values: a gate that is zero in
one step hides mixed samples, and so do a mask, a dead unit and a saturated attention. This module
carries the owners of the losses down through the operations, sizes and dimensions of a graph, which
are in its signature. An operation that is not listed, or that may mix samples, stops it: the rows
below are then probed in every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..graph import Graph, output_shapes
from .carry import CARRY, Ids, Unknown
from .owners import Output


def structure(losses: Tensor, graph: Graph, uses: Iterable[Node]) -> Mapping[Output, Ids] | None:
    """Find the sample of each entry of the output gradients at ``uses``, and above.

    Returns:
        Output -> int64 ids, broadcastable to the gradient, -1 where it is always zero; None where
        it may mix samples; no entry where no gradient arrives. None if an operation is not listed.
    """
    uses = set(uses)
    above = graph.above(uses)
    carrying = {*above, *uses}
    owners: dict[Output, Ids] = {}
    owners[Output(graph.nodes[0], losses.output_nr)] = torch.arange(len(losses), device="cpu")
    waiting = {node: len(graph.consumers[node]) for node in carrying}
    ready = [graph.nodes[0]]
    try:
        while ready:
            node = ready.pop()
            if node not in above:
                continue
            shapes = output_shapes(node)
            given = [(nr, Output(node, nr)) for nr in range(len(shapes))]
            for slot, (child, place) in enumerate(node.next_functions):
                if child is None or child not in carrying:
                    continue
                target, shape = Output(child, place), output_shapes(child)[place]
                for nr, out in given:
                    if out in owners:
                        ids = _carried(node, nr, owners[out], shapes[nr], slot, shape)
                        owners[target] = _merged(owners[target], ids) if target in owners else ids
                waiting[child] -= 1
                if waiting[child]:
                    continue
                ready.append(child)
                for out in (Output(child, nr) for nr in range(len(output_shapes(child)))):
                    if (complete := owners.get(out)) is not None:
                        owners[out] = _smallest(complete)
            for _, out in given:
                if node not in uses:
                    owners.pop(out, None)
    except Unknown:
        return None
    return owners


def _carried(node: Node, nr: int, ids: Ids, out: Any, slot: int, shape: Any) -> Ids:
    if ids is None or out is None or shape is None:
        return None
    carry = CARRY.get(node.name())
    if carry is None or 0 in out or 0 in shape:
        raise Unknown
    return carry(node, nr, ids, out, slot, shape)


def _merged(a: Ids, b: Ids) -> Ids:
    if a is None or b is None or bool(((a != b) & (a >= 0) & (b >= 0)).any()):
        return None
    return torch.maximum(a, b)


def _smallest(ids: Tensor) -> Tensor:
    """Reduce dimensions along which the owner is the same to size 1."""
    for d, size in enumerate(ids.shape):
        if size > 1 and bool((ids == (first := ids.narrow(d, 0, 1))).all()):
            ids = first
    return ids
