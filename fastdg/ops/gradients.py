"""Lists of gradients as the column ops take them: one flat list, domain after domain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """``gradients[d][k]`` at position ``d * P + k``, after a check that the domains agree.

    Raises:
        ValueError: there is no domain or no parameter, or a domain's tensors differ in number,
            shape, dtype or device from those of the first.
        TypeError: something is not a dense floating-point tensor.
    """
    for d, domain in enumerate(gradients):
        if not isinstance(domain, (list, tuple)):
            raise TypeError(
                f"gradients[{d}]: expected a list of tensors, the gradients of one domain, got "
                f"{type(domain).__name__}"
            )
    if len(gradients) == 0 or len(gradients[0]) == 0:
        raise ValueError("gradients: expected at least one domain with at least one tensor")
    first = gradients[0]
    for d, domain in enumerate(gradients):
        if len(domain) != len(first):
            raise ValueError(
                f"gradients[{d}]: expected {len(first)} tensors as in gradients[0], "
                f"got {len(domain)}"
            )
        for k, (gradient, like) in enumerate(zip(domain, first, strict=True)):
            tensor = isinstance(gradient, Tensor)
            if not (tensor and gradient.is_floating_point() and gradient.layout is torch.strided):
                got = f"{gradient.dtype}, {gradient.layout}" if tensor else type(gradient).__name__
                raise TypeError(
                    f"gradients[{d}][{k}]: expected a dense floating-point tensor, got {got}"
                )
            if gradient.shape != like.shape:
                raise ValueError(
                    f"gradients[{d}][{k}]: expected the shape {tuple(like.shape)} of "
                    f"gradients[0][{k}], got {tuple(gradient.shape)}"
                )
            if gradient.dtype != first[0].dtype or gradient.device != first[0].device:
                raise ValueError(
                    f"gradients[{d}][{k}]: expected {first[0].dtype} on {first[0].device} as "
                    f"gradients[0][0], got {gradient.dtype} on {gradient.device}"
                )
    return [gradient for domain in gradients for gradient in domain]


def check_weights(weights: Tensor, domains: int, device: torch.device) -> None:
    """Raise unless ``weights`` holds a floating-point number a domain, on ``device``.

    Raises:
        TypeError: its dtype is not floating point.
        ValueError: its shape or device is another.
    """
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights: expected a floating-point tensor, got {got}")
    if weights.shape != (domains,):
        raise ValueError(f"weights: expected the shape ({domains},), got {tuple(weights.shape)}")
    if weights.device != device:
        raise ValueError(f"weights: expected a tensor on {device}, got one on {weights.device}")


def of_parameter(flat: Sequence[Tensor], domains: int, k: int) -> list[Tensor]:
    """Parameter k's gradients, one a domain, from the flat list."""
    return list(flat[k :: len(flat) // domains])


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over parameters are returned in: float64 stays, halves become float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
