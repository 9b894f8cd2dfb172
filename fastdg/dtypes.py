"""The dtype of statistics, and the dtypes that have none."""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT = (torch.float32, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
_OPERANDS = (*_EXACT, *HALVES)


def to_statistics_dtype(x: Tensor) -> Tensor:
    """Convert ``x`` to the dtype of statistics: float64 stays, all others become float32.

    Raises:
        TypeError: ``x`` is complex.
    """
    if x.dtype in _EXACT:
        return x
    refuse_complex(x)
    return x.to(torch.float32)


def to_operand_dtype(x: Tensor) -> Tensor:
    """Convert ``x`` to a dtype that ops read: bfloat16 and float16 stay, others as in
    `to_statistics_dtype`."""
    return x if x.dtype in _OPERANDS else to_statistics_dtype(x)


def refuse_complex(x: Tensor) -> None:
    """Raise if a parameter, or its gradient, is complex."""
    if x.is_complex():
        raise TypeError(
            f"params: expected real parameters, got {x.dtype}. Keep real and imaginary part in a "
            "real parameter and read it by torch.view_as_complex in the forward, or freeze it."
        )
