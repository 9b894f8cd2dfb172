"""What `SWAD` averages with: means of means, and a loss to tell them apart by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

# What the first group holds before the first step. Lists in it are replaced, never changed
FRESH: dict[str, Any] = {
    "segment_steps": 0,
    "pending_steps": [],
    "losses": [],
    "average_steps": 0,
    "threshold": None,
    "finished": False,
}


def mean(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The mean of means of so many steps each."""
    total = sum(counts)
    result = parts[0] * (counts[0] / total)
    for part, count in zip(parts[1:], counts[1:], strict=True):
        result.add_(part, alpha=count / total)
    return result


def finite(name: str, value: Any) -> float:
    """``value``, a number or a tensor with one entry, as a float.

    Raises:
        TypeError, ValueError: it is none, or not finite.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name}: expected one number, got a tensor {list(value.shape)}")
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a finite number, got {type(value).__name__}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number
