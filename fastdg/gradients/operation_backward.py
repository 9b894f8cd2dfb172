"""The backward of a single operation, apart from the rest of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .graph import output_shapes
from .plain import unhooked


def backward_of(
    node: Node, grads: Sequence[Tensor | None], slots: Sequence[int]
) -> list[tuple[int, Tensor]]:
    """Run the operation's own backward: from gradients at its outputs to the inputs ``slots``.

    The node is called alone: the engine, stopped at one input of a node, also gives it gradients
    through the node's other inputs (``q @ q.t()``).
    """
    given = list(grads)
    shapes, below = output_shapes(node), node.next_functions
    like = next(g for g in given if g is not None)
    if callable(node):
        if len(given) > 1:
            for k, shape in enumerate(shapes):
                if given[k] is None and shape is not None:
                    given[k] = like.new_zeros(shape)
        made: Any = node(*given)
        results = made if isinstance(made, tuple) else (made,)
    else:  # a Python or compiled function: only the engine can call it
        wanted = [slot for slot, (child, _) in enumerate(below) if child is not None]
        there = [k for k, g in enumerate(given) if g is not None]
        caught: list[tuple[Tensor | None, ...]] = []
        # A gradient at an edge may also come through another input; a hook sees it before
        handle = node.register_hook(lambda inputs, outputs: caught.append(tuple(inputs)))
        leaves = [v for c, _ in below if (v := getattr(c, "variable", None)) is not None]
        try:
            with unhooked(leaves):
                torch.autograd.grad(
                    [GradientEdge(node, k) for k in there],
                    [GradientEdge(*below[slot]) for slot in wanted],  # type: ignore[arg-type]
                    [given[k] for k in there],
                    retain_graph=True,
                    create_graph=torch.is_grad_enabled(),
                    allow_unused=True,
                )
        finally:
            handle.remove()
        (results,) = caught
    out: list[tuple[int, Tensor]] = []
    for slot in slots:
        grad = results[slot]
        child, nr = below[slot]
        assert child is not None
        if grad is None:
            continue
        variable = getattr(child, "variable", None)
        shape = tuple(variable.shape) if variable is not None else output_shapes(child)[nr]
        if grad.is_sparse:
            grad = grad.to_dense()
        out.append((slot, grad.sum_to_size(shape) if tuple(grad.shape) != shape else grad))
    return out
