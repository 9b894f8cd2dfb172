"""Second derivatives of operations: a check before a gradient penalty needs them, and a gradient
with those of ours."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._torch import metadata_of
from ..domains import tracing
from .derivatives import OWN
from .graph import Graph

_known: dict[ref[type], bool] = {}  # kind of node -> whether its backward has a derivative


def refuse_single_derivatives(nodes: Iterable[Node], called: Container[Node]) -> None:
    """Raise if the backward of one of these nodes has no derivative: of autograd's for those that
    are ``called`` alone or traced, else of autograd's or ours."""
    for node in nodes:
        own = None if node in called or tracing() else OWN.get(node.name())
        if own is not None and own(node).serves():
            continue
        if not _known_differentiable(node):
            raise RuntimeError(
                f"create_graph: {_name(node)} lies between the tracked layers and the losses, and "
                f"it has no second derivative. {_advice(node)}, or track only layers after it "
                "(params='head', or a list of parameters)."
            )


def differentiable_grad(
    losses: Tensor, parameters: Sequence[Tensor], weight: Tensor
) -> list[Tensor | None]:
    """Compute gradients of leaves with their graph, as ``torch.autograd.grad(create_graph=True)``;
    where autograd has no second derivative, with ours.

    Args:
        losses: ``[N]`` with a graph.
        parameters: leaves.
        weight: gradient at ``losses`` ``[N]``.

    Returns:
        A gradient for each parameter, None where unused.

    Raises:
        RuntimeError: an operation has no second derivative.
    """
    assert losses.grad_fn is not None
    graph, handles = Graph(losses.grad_fn), []
    way = graph.above([n for p in parameters if (n := graph.leaves.get(id(p))) is not None])
    refuse_single_derivatives(way, ())
    for node in way:
        own = OWN.get(node.name())
        if own is not None and not _known_differentiable(node):
            handles += own(node).register()
    try:
        grads = torch.autograd.grad(
            losses, parameters, weight, create_graph=True, allow_unused=True
        )
    finally:
        for handle in handles:
            handle.remove()
    return list(grads)


def _known_differentiable(node: Node) -> bool:
    kind = ref(type(node))
    if kind not in _known:
        _known[kind] = _differentiable(node)
    return _known[kind]


def _differentiable(node: Any) -> bool:
    """Whether autograd knows a derivative of the node's backward."""
    if not callable(node):  # written in Python
        return node.name() != "CompiledFunctionBackward"
    given = [
        None
        if out is None
        else torch.zeros(tuple(out.shape), dtype=out.dtype, device=out.device, requires_grad=True)
        for out in metadata_of(node)
    ]
    try:
        with torch.enable_grad():
            made = node(*given)
        results = made if isinstance(made, tuple) else (made,)
        graphs = [r for r in results if isinstance(r, Tensor) and r.grad_fn is not None]
        if graphs:
            torch.autograd.grad(
                graphs,
                [g for g in given if g is not None],
                [torch.zeros_like(r) for r in graphs],
                allow_unused=True,
                retain_graph=True,
            )
    except (RuntimeError, TypeError) as error:  # other errors: the node needs other arguments
        return "derivative for" not in str(error)
    return True


def _name(node: Node) -> str:
    if node.name().startswith("ScaledDotProduct"):
        return "fused attention"
    if node.name() == "CompiledFunctionBackward":
        return "a part compiled by torch.compile"
    return node.name().partition("Backward")[0]


def _advice(node: Node) -> str:
    if node.name().startswith("ScaledDotProduct"):
        return (
            "Without dropout and a gradient of its mask it has one, outside torch.compile. Run the "
            "model under "
            "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )
    if node.name() == "CompiledFunctionBackward":
        return "Run that part uncompiled, compile the whole step with fastdg.compiled"
    return "Replace it by operations that have one"
