"""Masks of ADIOS's masker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import to_statistics_dtype


def check_masks(masks: Any, images: Tensor, values: bool) -> Tensor:
    """Check that ``masks`` are masks ``[B, N, H, W]`` of ``images`` with a graph; return them.

    Args:
        values: also check that they are >= 0 and sum to one, which waits for the device.
    """
    B, _, *size = images.shape
    if (
        not isinstance(masks, Tensor)
        or masks.dim() != images.dim()
        or [masks.shape[0], *masks.shape[2:]] != [B, *size]
        or masks.shape[1] < 2
    ):
        got = list(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(
            f"masker: expected masks [{B}, N, {', '.join(map(str, size))}] with N >= 2, got {got}. "
            "Return one mask [H, W] for each of N >= 2 parts of each image."
        )
    if not masks.requires_grad:
        raise RuntimeError(
            "masker: it must return masks with a graph, got requires_grad=False. Call step "
            "without torch.no_grad, with a masker that has trainable parameters."
        )
    if values:
        found = masks.detach()
        total, least = to_statistics_dtype(found).sum(1), found.min()
        if not ((total - 1).abs() < 1e-2).all() or least < 0:
            raise ValueError(
                "masker: expected masks that are >= 0 and sum to one at every pixel, got sums from "
                f"{total.min():.3g} to {total.max():.3g} and a least value of {least:.3g}. End the "
                "masker with a softmax over dimension 1."
            )
    return masks


def chosen(masks: Tensor, k: Tensor | int) -> Tensor:
    """Select mask k, one number for all images or ``[B]``: ``[B, 1, H, W]``."""
    if isinstance(k, int):
        return masks[:, k : k + 1]
    return masks[torch.arange(len(masks), device=masks.device), k].unsqueeze(1)
