"""Text forms of the training settings, and errors of ranks that differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

ELSEWHERE = (
    "the ranks are at different steps or run different algorithms. Give each rank the same number "
    "of batches and the same algorithm."
)
UNLIKE = (
    "the ranks have different weights. Wrap the model in DistributedDataParallel, which copies the "
    "weights of rank 0, or load the same state on all ranks."
)
USED = (
    "the forwards of the ranks used different parameters, so their gradients cannot be summed. Use "
    "the same parameters in every forward, or freeze the others."
)


def shown(value: Any) -> str:
    """Return a value as text without memory addresses."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k!r}: {shown(v)}' for k, v in value.items())}}}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else type(value).__qualname__


def divergence(texts: Sequence[str]) -> RuntimeError:
    """Return an error that names the first setting that differs from rank 0, and both values.

    Args:
        texts: the settings of each rank as JSON.
    """
    everyone = [json.loads(text) for text in texts]
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for key in (*first, *other):
            one, two = (words.get(key, "no such setting") for words in (first, other))
            if one != two:
                return RuntimeError(
                    f"{key}: expected the same on every rank, got {one} on rank 0 and {two} on "
                    f"rank {rank}. Create the wrapper with the same settings on all ranks, and "
                    "change them at the same steps."
                )
    raise AssertionError("two texts with one checksum")
