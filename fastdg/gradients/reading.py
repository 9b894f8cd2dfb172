"""Read the saved tensors of graph nodes: once, and late if a checkpoint recomputes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node

from .release import raw_saved


def unpack_hook(node: Node) -> Any:
    """Return the unpack hook of the node's saved tensors; None if they are not packed."""
    for saved in raw_saved(node):
        if (hook := saved.unpack_hook) is not None or saved.data is not None:
            return hook  # all tensors of a node have it, except an input None
    return None


class Reader:
    """Reader of nodes before a backward frees them.

    Nodes whose tensors a checkpoint recomputes are read when the backward comes to the first of
    them, all of one checkpoint together: the checkpoint computes them once, and holds them no
    longer than its own backward.

    Args:
        nodes: nodes to read.
        read: reads one node.
        early: nodes that the backward may free before it comes to them.
    """

    def __init__(
        self, nodes: Iterable[Node], read: Callable[[Node], None], early: Iterable[Node] = ()
    ) -> None:
        self._read = read
        self.later: dict[Node, tuple[bool, list[Node]]] = {}
        groups: dict[Any, list[Node]] = {}
        at_once, first = [], set(early)
        for node in nodes:
            if (hook := unpack_hook(node)) is None:
                read(node)
            elif node in first:
                at_once.append(node)
            else:
                together = getattr(hook, "__qualname__", "").startswith("_checkpoint_hook")
                group = groups.setdefault(hook if together else node, [])
                group.append(node)
                self.later[node] = together, group
        if at_once:
            in_one_pass(read, at_once)

    def come_to(self, node: Node) -> None:
        """Read ``node`` now unless it was read."""
        together, group = self.later.get(node, (False, ()))
        if not group:
            return
        nodes = list(group)
        group.clear()
        if together:
            in_one_pass(self._read, nodes)
        else:
            self._read(node)


def in_one_pass(read: Callable[[Node], None], nodes: Iterable[Node]) -> None:
    """Call ``read`` on the nodes inside a backward of its own, in which a checkpoint recomputes its
    tensors once. Outside a backward it would recompute all for each tensor; in the backward that
    follows, it gives each tensor once, to its node."""
    errors: list[BaseException] = []

    def call(grads: Any) -> None:
        try:
            with torch.set_grad_enabled(enabled):
                for one in nodes:
                    read(one)
        except BaseException as error:
            errors.append(error)

    enabled = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = torch.ones((), requires_grad=True)
        node = (leaf * 1).grad_fn
    assert node is not None
    node.register_prehook(call)
    torch.autograd.grad([GradientEdge(node, 0)], [leaf], [torch.ones(())])
    if errors:
        raise errors[0]
