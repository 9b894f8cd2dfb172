"""Loss scales: factors that keep a backward in the range of half precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler


class LossScale(NamedTuple):
    """The GradScaler of a step and its scale.

    Attributes:
        scaler: the GradScaler that has to unscale ``.grad``; None if ``.grad`` is not scaled.
        scale: 0-dim, on the device of the losses; None without a scaler.
    """

    scaler: GradScaler | None = None
    scale: Tensor | None = None


UNSCALED = LossScale()


def pow2_scale(losses: Tensor) -> float:
    """Return the power of two near 1 / N. A backward of the sum of losses that starts with it does
    not overflow where a backward of the mean does not, and division by it is exact."""
    return 0.5 ** (losses.shape[0] - 1).bit_length()


def backward_scale(losses: Tensor, scale: Tensor | None) -> Tensor | None:
    """Return the gradient scale for a backward of the sum of ``losses`` under a
    ``torch.amp.GradScaler`` of the factor ``scale`` (0-dim): its gradients are as large as in a
    scaled backward of the mean. Divide the results by it."""
    return None if scale is None else scale * pow2_scale(losses)


def mean_scale(losses: Tensor, scale: Tensor | None) -> tuple[Tensor, float | Tensor]:
    """Return the gradient of the mean of ``losses`` at each, times ``scale``, and its inverse."""
    samples = losses.shape[0]
    weight = torch.full_like(losses, 1 / samples, requires_grad=False)
    if scale is None:
        return weight, samples
    scale = scale.to(losses.device, non_blocking=True)
    return weight * scale.to(weight.dtype), samples / scale


def unscaled(grad: Tensor, grad_scale: Tensor | float | None) -> Tensor:
    """Divide ``grad`` by the scale of its backward; float16 becomes float32, to avoid underflow."""
    if grad_scale is None:
        return grad
    grad_scale = grad_scale.to(grad.device) if isinstance(grad_scale, Tensor) else grad_scale
    return (grad.float() if grad.dtype == torch.float16 else grad) / grad_scale
