"""Reentrant checkpoints, whose operations are not in the graph of the losses."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

_NAME = "CheckpointFunctionBackward"


def reentrant_checkpoints(nodes: Sequence[Node]) -> list[Any]:
    """Return the nodes that are reentrant checkpoints."""
    if all(kind.__name__ != _NAME for kind in set(map(type, nodes))):  # fast, since every step asks
        return []
    return [node for node in nodes if node.name() == _NAME]


def tensors_inside(checkpoint: Any) -> Iterator[Tensor]:
    """Yield the tensors that Python shows in a checkpoint's function: parameters of its module,
    its bound arguments, and its closure."""
    pending = [checkpoint.run_function]
    seen: set[int] = set()
    for value in pending:  # grows while we walk it
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
        elif isinstance(value, partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, (list, tuple)):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
        elif inspect.ismethod(value):
            pending += [value.__self__, value.__func__]
        elif inspect.isfunction(value):
            pending += _closed_over(value)


def _closed_over(function: Any) -> Iterable[Any]:
    values = list(function.__defaults__ or ())
    with suppress(ValueError):  # a name without a value so far
        names = inspect.getclosurevars(function)
        values += names.nonlocals.values()
        values += [v for v in names.globals.values() if isinstance(v, (Tensor, nn.Module))]
    return values
