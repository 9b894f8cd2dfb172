"""Context variables that are seen wherever a backward runs.

Autograd runs the nodes of an accelerator, their hooks too, in threads of its own, whose context is
empty. `torch.autograd` hands these threads a copy of the context that called the backward, for
PyTorch's compiler: a `Carried` looks there for a value that its thread does not have, and a hook
that is `continued` runs in that context, so that a backward which it calls has it too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

from ._torch import context_of_backward

R = TypeVar("R")
T = TypeVar("T")
_UNSET: Any = object()


class Carried(Generic[T]):
    """A ``ContextVar`` that autograd's threads see as the caller of the backward does."""

    def __init__(self, name: str, default: T) -> None:
        self._variable: ContextVar[Any] = ContextVar(name)
        self._default = default

    def get(self) -> T:
        value = self._variable.get(_UNSET)
        if value is _UNSET and (context := context_of_backward()) is not None:
            value = context.get(self._variable, _UNSET)
        return self._default if value is _UNSET else value

    def set(self, value: T) -> Token[T]:
        return self._variable.set(value)

    def reset(self, token: Token[T]) -> None:
        self._variable.reset(token)


def continued(hook: Callable[..., R]) -> Callable[..., R]:
    """``hook``, run in the context that called the backward."""

    def run(*args: Any) -> R:
        context = context_of_backward()
        return hook(*args) if context is None else context.copy().run(hook, *args)

    return run
