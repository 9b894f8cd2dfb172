"""The power of two, or the factor of a GradScaler, that a backward begins with."""

from __future__ import annotations

import torch
from torch import Tensor


def about_mean(losses: Tensor) -> float:
    """About 1 / N, a power of two: in half precision, a backward of their sum begins with it where
    that of the mean would not overflow, and what it finds is divided by it exactly."""
    return 0.5 ** (losses.shape[0] - 1).bit_length()


def root(losses: Tensor, scale: Tensor | None) -> Tensor | None:
    """What a backward of the sum of ``losses`` begins with under a ``torch.amp.GradScaler`` of the
    factor ``scale`` (0-dim), where it meets the numbers that a scaled backward of the mean does.
    What it finds has to be divided by it."""
    return None if scale is None else scale * about_mean(losses)


def unscaled(grad: Tensor, start: Tensor | float | None) -> Tensor:
    """``grad`` of a backward that began with ``start``, divided by it; no longer in float16, where
    it would underflow after all."""
    if start is None:
        return grad
    start = start.to(grad.device) if isinstance(start, Tensor) else start
    return (grad.float() if grad.dtype == torch.float16 else grad) / start
