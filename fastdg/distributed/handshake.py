"""The settings of a training, in words that are the same wherever they are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

ELSEWHERE = (
    "the ranks are at different steps of their runs, or run different algorithms; give each rank "
    "the same number of batches"
)
UNLIKE = (
    "the ranks have different weights; wrap the model in DistributedDataParallel, which gives all "
    "those of rank 0, or load the same state on all"
)
USED = (
    "the forwards of the ranks used different parameters, so what there is to add up differs; "
    "let every forward use the same ones, or freeze the others"
)


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


def divergence(texts: Sequence[str]) -> RuntimeError:
    """Name the first setting in which a rank differs from rank 0, and both values.

    Args:
        texts: of each rank, the settings as JSON.
    """
    everyone = [json.loads(text) for text in texts]
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
