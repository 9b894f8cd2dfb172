"""Context variables that every thread of a backward sees.

Autograd runs the nodes of an accelerator and their hooks in its own threads, whose context is
empty. For PyTorch's compiler, autograd gives these threads a copy of the context that called the
backward. A `Carried` looks there for a value that its thread does not have. A `continued` hook runs
in that context, so a backward that the hook calls has it too.
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
    """``ContextVar`` whose value in autograd's threads is the value of the backward's caller."""

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
    """Wrap ``hook`` to run in the context that called the backward."""

    def run(*args: Any) -> R:
        context = context_of_backward()
        return hook(*args) if context is None else context.copy().run(hook, *args)

    return run
