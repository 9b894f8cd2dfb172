"""Free the saved tensors of a graph, as its last backward would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any
from weakref import ref

from torch.autograd.graph import Node

from .._torch import RAW_SAVED

_names: dict[ref[type], tuple[str, ...]] = {}


def release(nodes: Iterable[Node]) -> None:
    """Free the saved tensors of ``nodes`` that no backward has freed.

    Autograd frees the tensors of the nodes that it runs. A backward to the outputs of layers does
    not run the nodes below: the first layer would keep the batch as long as a user keeps the
    losses, say for a plot. Hooks are torch's public way to replace a saved tensor; these hooks keep
    nothing. Tensors with hooks already (checkpoints, offloading) stay.
    """
    for node in nodes:
        for saved in raw_saved(node):
            if saved.data is None:  # no tensor, or freed; faster than an error
                continue
            with suppress(RuntimeError):  # it has hooks
                saved.register_hooks(_nothing, _refuse)


def keeps_tensors(node: Node) -> bool:
    """Whether a node of this kind saves tensors."""
    return bool(_raw_names(node))


def raw_saved(node: Node) -> Iterator[Any]:
    """Yield the ``SavedTensor`` of each tensor that ``node`` has saved, without unpacking it."""
    for name in _names.get(ref(type(node))) or _raw_names(node):
        try:
            value = getattr(node, name)
        except RuntimeError:  # a Python function whose tensors were freed
            continue
        yield from value if isinstance(value, (tuple, list)) else (value,)


def _raw_names(node: Node) -> tuple[str, ...]:
    kind = ref(type(node))
    if (names := _names.get(kind)) is None:
        names = tuple(name for name in dir(type(node)) if name.startswith(RAW_SAVED))
        _names[kind] = names
    return names


def _nothing(tensor: Any) -> None:
    """Keep nothing of a tensor."""


def _refuse(nothing: None) -> Any:
    raise RuntimeError(
        "losses: their graph was freed by the backward of a fastdg optimizer, or by a statistic "
        "with retain_graph=False. Run the model again, or pass retain_graph=True to the statistic."
    )
