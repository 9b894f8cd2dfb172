"""Checks of the factors of outer products, and of convolution windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..window import extent, positions, split
from .tensors import LARGEST_SIDE, dims, floating


def outer(a: Any, delta: Any, window: Sequence[int]) -> tuple[Any, Any]:
    """Check the factors of outer products; returns the shape ``(O, I)`` of their sums."""
    floating("a", a)
    floating("delta", delta, a, "a")
    dims("delta", delta, "[N, T, O]", 3)
    if window:
        T, inputs = _windowed(a, window)
    else:
        dims("a", a, "[N, T, I]", 3)
        _, T, inputs = a.shape
    N, positions, outputs = delta.shape
    if a.shape[0] != N:
        raise ValueError(
            f"a: expected {N} samples as delta, got {a.shape[0]}. Pass tensors of one forward."
        )
    if positions != T:
        raise ValueError(
            f"delta: expected {T} positions (dimension 1), got {positions}. "
            "Flatten the output gradients to [N, T, O] in the order of a's rows or patches."
        )
    for name, size in (("a", T), ("a", inputs), ("delta", outputs)):
        if size > LARGEST_SIDE:
            raise ValueError(
                f"{name}: expected at most 2**28 positions, inputs and outputs, got {size}. "
                "Split the layer."
            )
    return outputs, inputs


def _windowed(a: Tensor, window: Sequence[int]) -> tuple[Any, Any]:
    """Return ``(T, I)`` of the patches."""
    count = a.dim() - 2
    # 12 numbers are those of three dimensions with padding
    if count < 1 or count == 4 or len(window) not in (3 * count, 4 * min(count, 3)):
        raise ValueError(
            "window: expected 3 numbers for each of one to three spatial dimensions of a [N, C, "
            f"*S], or 4 with padding, got {len(window)} for {max(count, 0)} dimensions. Pass "
            "[*kernel, *stride, *dilation] or [*kernel, *stride, *dilation, *padding]."
        )
    for k, step in enumerate(window):
        if not hasattr(step, "__index__") or step < (k < 3 * count):
            raise ValueError(
                f"window: expected positive integers, or padding from 0 on, got {step!r}. Pass "
                "[*kernel, *stride, *dilation] or [*kernel, *stride, *dilation, *padding]."
            )
    kernel, _, dilation = split(window)
    for size, k, d in zip(extent(a.shape[2:], window), kernel, dilation, strict=True):
        if d * (k - 1) >= size:
            raise ValueError(
                f"window: expected patches that fit into a, got one of {d * (k - 1) + 1} places on "
                f"{size}. Pad a first (fastdg.ops.window.pad)."
            )
    T, inputs = 1, a.shape[1]
    for places, k in zip(positions(a.shape[2:], window), kernel, strict=True):
        T, inputs = T * places, inputs * k
    return T, inputs
