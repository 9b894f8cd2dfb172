"""Values that a forward attaches to the autograd graph for its backward.

A value lives as long as the graph, and belongs to the losses of its own forward, however many
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
    """Return whether a forward that runs now is the user's, and may have a backward.

    It is False inside the user's own torch.func transforms: fastdg.func supports these.
    """
    return torch.is_grad_enabled() and not jit_tracing() and not functorch_active()


class FastdgNote(torch.autograd.Function):
    """Alias of a tensor, with its memory and version counter but a new graph node."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


# Function.apply calls it if no torch.func transform is active; a direct call takes half the time
_behind_node = super(torch.autograd.Function, FastdgNote).apply


def alias(tensor: Tensor) -> Tensor:
    """Return an alias of a module's input that may be kept, as autograd keeps saved tensors.

    A tensor that is changed in place later gets a new graph node, and the module's node may be
    below it. Kept by the module's node, the tensor itself would be in a reference cycle that
    Python's collector does not see.
    """
    return _behind_node(tensor) if tensor.requires_grad else tensor.detach()


def attach_to_graph(output: Any, owner: object, value: Any) -> Any:
    """Attach ``value`` for ``owner`` to a module's output; return the result from a forward hook.

    Every tensor in it gets a new graph node, above all nodes of the value's graph: on a node below
    its own, the value would be in a reference cycle that Python's collector does not see.
    """

    def noted(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        tensor = alias(tensor)
        attach(tensor, owner, value)
        return tensor

    return pytree.tree_map_only(Tensor, noted, output)


def attach(tensor: Tensor, owner: object, value: Any) -> None:
    """Attach ``value``, which has no graph, for ``owner`` to the node of ``tensor`` itself."""
    metadata: Any = get_gradient_edge(tensor).node.metadata
    metadata.setdefault(_KEY, []).append((weakref.ref(owner), value))


def attached(losses: Tensor, owner: object) -> list[Any]:
    """Collect the values of ``owner`` on the graph of ``losses``, of the last forward on each path.

    A value that several paths reach comes once.
    """
    assert losses.grad_fn is not None
    pending: list[Node] = [losses.grad_fn]
    seen = set(pending)
    values: list[Any] = []
    for node in pending:  # grows in the loop
        metadata: Any = node.metadata
        own = [value for ref, value in metadata.get(_KEY, ()) if ref() is owner]
        values += [value for value in own if all(value is not other for other in values)]
        if own:
            continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                pending.append(below)
    return values


class Seen(NamedTuple):
    """The output of a module, and its version at that time."""

    tensor: Tensor
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> Seen:
        return cls(tensor, version_of(tensor))

    def changed(self) -> bool:
        """Return whether the tensor was changed in place since."""
        return version_of(self.tensor) != self.version


def hook_on(register: Callable[..., Any], owner: object, method: str, *args: Any) -> None:
    """Register a hook of a module that calls a method of ``owner``, for the owner's lifetime.

    Args:
        register: a method such as ``module.register_forward_hook``, or a partial of it.
        args: arguments of the method before the hook's own.
    """
    handle = register(WeakHook(owner, method, *args))
    weakref.finalize(owner, handle.remove).atexit = False


class WeakHook:
    """A module's hook that calls a method of its owner while the owner is alive.

    A copy of it, on a copied or pickled module, does nothing: a copied owner registers its own.
    """

    def __init__(self, owner: object | None = None, method: str = "", *args: Any) -> None:
        self.owner = weakref.ref(owner) if owner is not None else lambda: None
        self.method, self.args = method, args

    @not_compiled
    def __call__(self, *seen: Any) -> Any:
        owner = self.owner()
        return None if owner is None else getattr(owner, self.method)(*self.args, *seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakHook:
        return WeakHook()

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return WeakHook, ()
