"""Gradients as ops take them, one flat list, domain after domain, and as they lay them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return ``gradients[d][k]`` at position ``d * P + k``. The op checks the tensors.

    Raises:
        TypeError: a domain has no list.
        ValueError: there is no domain or no parameter, or a domain has another number of tensors.
    """
    for d, domain in enumerate(gradients):
        if not isinstance(domain, (list, tuple)):
            raise TypeError(
                f"gradients[{d}]: expected a list of tensors, the gradients of one domain, got "
                f"{type(domain).__name__}. Pass a list of lists: gradients[d][k]."
            )
    if len(gradients) == 0 or len(gradients[0]) == 0:
        raise ValueError(
            "gradients: expected at least one domain with at least one tensor, got none. "
            "Pass a list of tensors for each domain."
        )
    for d, domain in enumerate(gradients):
        if len(domain) != len(gradients[0]):
            raise ValueError(
                f"gradients[{d}]: expected {len(gradients[0])} tensors as in gradients[0], "
                f"got {len(domain)}. Pass zeros for a gradient that a domain lacks."
            )
    return [gradient for domain in gradients for gradient in domain]


def in_dtype_of(gradient: Tensor, weights: Tensor) -> Tensor:
    """Weights in the dtype of the statistics of ``gradient``; the op refuses other types."""
    if isinstance(gradient, Tensor) and isinstance(weights, Tensor) and weights.is_floating_point():
        return weights.to(statistic_dtype(gradient.dtype))
    return weights


def of_parameter(flat: Sequence[Tensor], domains: int, k: int) -> list[Tensor]:
    """Parameter k's gradients, one a domain, from the flat list."""
    return list(flat[k :: len(flat) // domains])


def statistic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over parameters: float64 stays, halves become float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_rows(*maps: Tensor) -> bool:
    """Return whether the channels of a position lie side by side, as in tokens."""
    return all(
        x.shape[-1] > 1 and x.stride(-1) != 1 and (x.shape[-2] < 2 or x.stride(-2) == 1)
        for x in maps
    )


def gradient_like(x: Tensor, rows: bool) -> Tensor:
    """Allocate a gradient of x in dense memory, with its channels or its positions side by side."""
    *outer, channels, positions = x.shape
    if rows:
        return x.new_empty((*outer, positions, channels)).transpose(-2, -1)
    return x.new_empty(x.shape)
