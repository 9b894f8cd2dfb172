"""The derivatives of the ops, for autograd and for the transforms of ``torch.func``.

``torch.library.register_autograd`` serves autograd and ``torch.compile``. The transforms of
``torch.func`` and forward-mode differentiation do not see a derivative that is registered there:
inside them an op is called through a `torch.autograd.Function` of the same formulas. Eager code
calls another such function, since the dispatcher takes longer than a small op; it has no
``setup_context``, as torch would bind its arguments to a signature, which takes as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _torch
from ..._torch import pytree
from .registry import OPS, force, forced_backend, library

_PLAIN = {Tensor, int, float, bool, type(None)}  # no subclasses of a tensor
_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}
_EAGER: dict[str, type[torch.autograd.Function]] = {}


def differentiable(name: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give op ``name``, which returns tensors and no lists of them, a derivative; ``setup`` and
    ``backward`` as in ``register_autograd``."""
    _EAGER[name] = _register(name, setup, backward)


def _register(
    name: str, setup: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """Register a derivative; returns the function for eager code."""

    def setup_here(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = forced_backend()
        setup(ctx, inputs, output)

    def backward_there(ctx: Any, *grads: Any) -> Any:
        if ctx.backend is None:
            return backward(ctx, *grads)
        with force(ctx.backend):  # autograd's own threads do not see the block of the forward
            return backward(ctx, *grads)

    torch.library.register_autograd(
        f"fastdg::{name}", backward_there, setup_context=setup_here, lib=library
    )
    eager, _FUNCTIONS[name] = _functions(name, setup_here, backward_there)
    return eager


def not_differentiable(name: str, instead: str) -> None:
    """Let calls of op ``name`` be recorded, and raise when a backward reaches one."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"fastdg::{name} has no derivative. {instead}")

    _register(name, lambda ctx, inputs, output: None, refuse)


def not_recorded(name: str) -> None:
    """Let op ``name``, which changes its arguments, run wherever autograd records, unseen by it."""
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def call(name: str, *args: Any) -> Any:
    """Call op ``name`` on ``args``: in eager code, under transforms, or traced."""
    if _torch.functorch_active() or _torch.forward_ad_active():
        if name not in _FUNCTIONS:
            raise RuntimeError(
                f"fastdg::{name}: it changes its arguments. Call it outside the transforms of "
                "torch.func and outside forward-mode differentiation."
            )
        return _applied(_FUNCTIONS[name], args)
    # Without dispatch modes and tensor subclasses only autograd watches the call
    if not (torch.compiler.is_compiling() or _torch.dispatch_modes()):
        flat = [x for arg in args for x in (arg if isinstance(arg, list) else (arg,))]
        kinds = set(map(type, flat))
        if kinds <= _PLAIN or not any(issubclass(kind, Tensor) for kind in kinds - _PLAIN):
            tensors = [x for x in flat if isinstance(x, Tensor)] if torch.is_grad_enabled() else []
            if True not in [x.requires_grad for x in tensors]:
                return OPS[name](*args)
            if name in _EAGER:
                return _applied(_EAGER[name], args)
    op = getattr(torch.ops.fastdg, name)
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError:  # of the schema, for one, which says less
        OPS[name].check(*args)
        raise


def _tensors(arg: Any) -> int:
    """Return the length of a list of tensors; 0 for any other argument."""
    return len(arg) if isinstance(arg, list) and arg and isinstance(arg[0], Tensor) else 0


def _applied(function: type[torch.autograd.Function], args: Sequence[Any]) -> Any:
    """Apply ``function`` to the arguments, with lists unpacked, and to `_tensors` of each."""
    sizes = tuple(_tensors(arg) for arg in args)
    flat = [x for arg, n in zip(args, sizes, strict=True) for x in (arg if n else [arg])]
    return function.apply(*flat, sizes)


def _gathered(given: Sequence[Any]) -> tuple[list[Any], Sequence[int]]:
    """Return the arguments and `_tensors` of each from the flat list of `_applied`."""
    *flat, sizes = given
    rest = iter(flat)
    return [[next(rest) for _ in range(n)] if n else next(rest) for n in sizes], sizes


def _functions(
    name: str, setup: Callable[..., None], backward: Callable[..., Any]
) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
    """Return op ``name`` for eager code, and for transforms; to be `_applied`."""

    class Derivative(torch.autograd.Function):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            flat: list[Any] = []
            for found, n in zip(backward(ctx, *grads), ctx.sizes, strict=True):
                each = isinstance(found, (list, tuple))
                flat += (found if each else [found] * n) if n else [None if each else found]
            return (*flat, None)

    def forward(ctx: Any, *given: Any) -> Any:
        args, ctx.sizes = _gathered(given)
        output = OPS[name](*args)
        setup(ctx, args, output)
        return output

    class Transformed(Derivative):
        @staticmethod
        def forward(*given: Any) -> Any:
            output = getattr(torch.ops.fastdg, name)(*_gathered(given)[0])
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            args, ctx.sizes = _gathered(inputs)
            setup(ctx, args, output)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
            rows = [
                Transformed.apply(
                    *(
                        x.select(d, i) if isinstance(d, int) else x
                        for x, d in zip(given, in_dims, strict=True)
                    )
                )
                for i in range(info.batch_size)
            ]
            output = pytree.tree_map(lambda *parts: torch.stack(parts), *rows)
            return output, pytree.tree_map(lambda part: 0, output)

    # Its node has the name that `register_autograd` gives, so that rules know both
    title = f"GeneratedBackwardFor_fastdg_{name}_default"
    return type(title, (Derivative,), {"forward": staticmethod(forward)}), Transformed
