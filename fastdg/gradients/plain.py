"""Autograd's own gradients, without parameter hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._torch import hook_tables, is_plain
from ..domains import tracing
from .errors import in_words


@contextmanager
def unhooked(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Disable the gradient hooks of these parameters inside."""
    with resting(table for p in parameters if (table := hook_tables(p)[0])):
        yield


@contextmanager
def resting(tables: Iterable[dict[int, Any]]) -> Iterator[None]:
    """Empty the tables of hooks inside, and restore them after."""
    tables = list(tables)
    hooks = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, own in zip(tables, hooks, strict=True):
            table.update(own)


def gradients_of(
    losses: Tensor, parameters: Sequence[Tensor], weight: Tensor, *, retain_graph: bool = True
) -> list[Any]:
    """Compute autograd's gradients of ``(weight * losses).sum()`` without parameter hooks."""
    with in_words(), unhooked(parameters), without_autocast(losses):
        grads = torch.autograd.grad(
            losses, list(parameters), weight, retain_graph=retain_graph, allow_unused=True
        )
    return list(grads)


def recorded(x: Tensor) -> bool:
    """Return whether autograd records operations on ``x``, and a function of ours may be one."""
    return torch.is_grad_enabled() and x.requires_grad and is_plain(x) and not tracing()


def recording() -> AbstractContextManager[Any]:
    """Enable gradients, in inference mode, too, as autograd's backward does."""
    inference = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inference else torch.enable_grad()


def without_autocast(losses: Any) -> AbstractContextManager[Any]:
    """Disable autocast on the losses' device: a backward has the dtypes of its graph."""
    device = losses.device.type if isinstance(losses, Tensor) else None
    if device is None or not _has_autocast(device):
        return _NOTHING
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else _NOTHING


_NOTHING = nullcontext()
_has_autocast = cache(torch.amp.is_autocast_available)
