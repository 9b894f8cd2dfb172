"""The settings of a training, in words that are the same wherever they are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from ..core.nesting import chain, innermost

if TYPE_CHECKING:
    from .ranks import Ranks


def settings_of(opt: Optimizer | None) -> dict[str, str]:
    """What the wrappers are, from the outermost on, and the settings of each, with its name."""
    assert opt is not None
    links = list(chain(opt))
    names = [type(link).__name__ for link in (*links, innermost(opt))]
    return {
        "opt": "(".join(names) + ")" * len(links),
        **{
            f"{type(link).__name__}.{name}": shown(value)
            for link in links
            for name, value in link.settings().items()
        },
    }


def shown(value: Any) -> str:
    """A value in words that hold no address in memory."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k!r}: {shown(v)}' for k, v in value.items())}}}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else type(value).__qualname__


def divergence(ranks: Ranks, own: dict[str, str]) -> RuntimeError:
    """Name the first setting in which a rank differs from rank 0, and both values.

    All ranks come here, since all have seen that their sums differ.
    """
    everyone = [json.loads(text) for text in _texts(ranks, json.dumps(own))]
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for key in (*first, *other):
            one, two = (words.get(key, "no such setting") for words in (first, other))
            if one != two:
                return RuntimeError(
                    f"{key}: expected the same on every rank, got {one} on rank 0 and {two} on "
                    f"rank {rank}. Make the wrapper alike on all ranks, and change its settings in "
                    "the same steps on all."
                )
    raise AssertionError("two texts of one sum")


def _texts(ranks: Ranks, own: str) -> list[str]:
    """Every rank's text."""
    code = torch.tensor(list(own.encode()), device=ranks.meeting_place(None))
    sizes = code.new_zeros(ranks.size)
    sizes[ranks.rank] = len(code)
    lengths: list[int] = ranks.all_reduce([sizes])[0].tolist()
    table = code.new_zeros(ranks.size, max(lengths))
    table[ranks.rank, : len(code)] = code
    rows = ranks.all_reduce([table])[0].tolist()
    return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]
