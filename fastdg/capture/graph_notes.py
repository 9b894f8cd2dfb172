"""What a forward leaves behind for its backward, on the autograd graph itself.

It dies with the graph, and belongs to the losses that come from that forward, however many
forwards there are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from .._torch import functorch_active, jit_tracing, not_compiled, pytree, version_of

_KEY = "fastdg_left"


def recording() -> bool:
    """Whether a forward that runs now is the user's, and will have a backward.

    Not inside the user's own torch.func transforms, for which fastdg.func is.
    """
    return torch.is_grad_enabled() and not jit_tracing() and not functorch_active()


class FastdgNote(torch.autograd.Function):
    """The same memory and version counter, behind the graph node that the tensor has now."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


# What Function.apply itself calls where no torch.func transform is active, in half the time
_behind_node = super(torch.autograd.Function, FastdgNote).apply


def alias(tensor: Tensor) -> Tensor:
    """What to keep of a module's input, as autograd keeps what it saves.

    A tensor that is changed in place later on gets a new graph node, one below which the module's
    own may lie. Kept by that node it would keep itself alive, in a cycle that no collector sees.
    """
    return _behind_node(tensor) if tensor.requires_grad else tensor.detach()


def leave(output: Any, owner: object, value: Any) -> Any:
    """The output of a module with ``value`` left for ``owner``; return it from a forward hook.

    Every tensor in it gets a graph node of its own, above all that the value's graph may hold: a
    value on a node below its own would keep itself alive, in a cycle that no collector sees.
    """

    def noted(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        tensor = alias(tensor)
        mark(tensor, owner, value)
        return tensor

    return pytree.tree_map_only(Tensor, noted, output)


def mark(tensor: Tensor, owner: object, value: Any) -> None:
    """Leave ``value``, which holds no graph, for ``owner`` on the node of ``tensor`` itself."""
    left: Any = get_gradient_edge(tensor).node.metadata
    left.setdefault(_KEY, []).append((weakref.ref(owner), value))


def found(losses: Tensor, owner: object) -> list[Any]:
    """What was left for ``owner`` on the graph of ``losses``: of the last forward on each path."""
    assert losses.grad_fn is not None
    pending: list[Node] = [losses.grad_fn]
    seen = set(pending)
    values: list[Any] = []
    for node in pending:  # grows while we walk it
        left: Any = node.metadata
        own = [value for ref, value in left.get(_KEY, ()) if ref() is owner]
        values += [value for value in own if all(value is not other for other in values)]
        if own:
            continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                pending.append(below)
    return values


class Seen(NamedTuple):
    """The result of a module, and its version then."""

    tensor: Tensor
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> Seen:
        return cls(tensor, version_of(tensor))

    def changed(self) -> bool:
        """Whether the tensor was changed in place since."""
        return version_of(self.tensor) != self.version


def hook_on(register: Callable[..., Any], owner: object, method: str, *args: Any) -> None:
    """Register a hook of a module that calls a method of ``owner``, for as long as that lives.

    Args:
        register: ``module.register_forward_hook`` or the like; or a partial of it.
        args: arguments of the method before those of the hook.
    """
    handle = register(Hook(owner, method, *args))
    weakref.finalize(owner, handle.remove).atexit = False


class Hook:
    """A module's hook that calls a method of its owner, for as long as that lives.

    A copy of it, on a copied or pickled module, does nothing: a copied owner hooks itself on.
    """

    def __init__(self, owner: object | None = None, method: str = "", *args: Any) -> None:
        self.owner = weakref.ref(owner) if owner is not None else lambda: None
        self.method, self.args = method, args

    @not_compiled
    def __call__(self, *seen: Any) -> Any:
        owner = self.owner()
        return None if owner is None else getattr(owner, self.method)(*self.args, *seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()
