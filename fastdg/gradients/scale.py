"""Factors that keep a backward in the range of half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def about_mean(losses: Tensor) -> float:
    """Return the power of two near 1 / N. A backward of the sum of losses that starts with it does
    not overflow where a backward of the mean does not, and division by it is exact."""
    return 0.5 ** (losses.shape[0] - 1).bit_length()


def root(losses: Tensor, scale: Tensor | None) -> Tensor | None:
    """Return the start gradient for a backward of the sum of ``losses`` under a
    ``torch.amp.GradScaler`` of the factor ``scale`` (0-dim): its gradients are as large as in a
    scaled backward of the mean. Divide the results by it."""
    return None if scale is None else scale * about_mean(losses)


def unscaled(grad: Tensor, start: Tensor | float | None) -> Tensor:
    """Divide ``grad`` by the ``start`` gradient of its backward; float16 becomes float32, to avoid
    underflow."""
    if start is None:
        return grad
    start = start.to(grad.device) if isinstance(start, Tensor) else start
    return (grad.float() if grad.dtype == torch.float16 else grad) / start
