"""The geometry of a convolution seen as an outer product.

A convolution's weight gradient for sample i is ``sum_t delta[i, t] (x) patch[i, t]`` with one
patch per output position. ``window = [*kernel, *stride, *dilation]`` describes the patches of a
padded input ``a [N, C, *S]``; an empty ``window`` means that ``a [N, T, I]`` holds the rows
themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F


def split(window: Sequence[int]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Return ``(kernel, stride, dilation)``, each with one entry per spatial dimension."""
    dims = len(window) // 3
    return window[:dims], window[dims : 2 * dims], window[2 * dims :]


def positions(spatial: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Output positions along each spatial dimension of a padded input."""
    kernel, stride, dilation = split(window)
    return tuple(
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(spatial, kernel, stride, dilation, strict=True)
    )


def sizes(a_shape: Sequence[int], window: Sequence[int]) -> tuple[int, int]:
    """Return ``(T, I)`` of the outer product described by ``a`` and ``window``."""
    if not window:
        return a_shape[1], a_shape[2]
    return prod(positions(a_shape[2:], window)), a_shape[1] * prod(split(window)[0])


def steps(strides: Sequence[int], factors: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Element offsets from one of ``counts`` places to the next; 0 where there is one place, whose
    factor may be any integer."""
    return [
        stride * factor if count > 1 else 0
        for stride, factor, count in zip(strides, factors, counts, strict=True)
    ]


def unfold(a: Tensor, window: Sequence[int]) -> Tensor:
    """Rows ``[N, T, I]`` of ``a``; a differentiable copy when there is a window."""
    if not window:
        return a
    kernel, stride, dilation = split(window)
    out = positions(a.shape[2:], window)
    dims = len(kernel)
    spatial = a.stride()[2:]
    rows, taps = steps(spatial, stride, out), steps(spatial, dilation, kernel)
    patches = a.as_strided(
        (a.shape[0], *out, a.shape[1], *kernel),
        (a.stride(0), *rows, a.stride(1), *taps),
        a.storage_offset(),
    )
    return patches.flatten(1 + dims).flatten(1, dims)


def fold(rows: Tensor, a_shape: Sequence[int], window: Sequence[int]) -> Tensor:
    """Return the transpose of `unfold`: sums rows ``[N, T, I]`` back into ``a_shape``."""
    if not window:
        return rows
    kernel, stride, dilation = split(window)
    out = positions(a_shape[2:], window)
    values = rows.unflatten(2, (a_shape[1], *kernel)).unflatten(1, out)
    dims = len(kernel)
    folded = rows.new_zeros(tuple(a_shape))
    for taps in product(*(range(k) for k in kernel)):
        inside = tuple(
            slice(tap * d, tap * d + (o - 1) * s + 1, s)
            for tap, d, o, s in zip(taps, dilation, out, stride, strict=True)
        )
        where = (slice(None), slice(None), *inside)
        part = values[(slice(None),) * (2 + dims) + taps]  # [N, *out, C]
        folded[where] += part.movedim(-1, 1)
    return folded


@lru_cache(maxsize=256)
def offsets(
    channels: int,
    spatial: tuple[int, ...],
    strides: tuple[int, ...],
    window: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Element offsets ``(row [T], column [I])`` of a patch inside one sample of ``a``.

    Element ``(t, i)`` of the unfolded sample lies at ``row[t] + column[i]``. ``strides`` are the
    strides of ``a`` without the sample dimension: ``(channel, *spatial)``.
    """
    kernel, stride, dilation = split(window)
    out = positions(spatial, window)

    def grid(counts: Sequence[int], steps: Sequence[int]) -> Tensor:
        total = torch.zeros((), dtype=torch.int64)
        for count, step in zip(counts, steps, strict=True):
            total = total.unsqueeze(-1) + torch.arange(count) * step
        return total.flatten().to(device=device, dtype=torch.int32)

    row = grid(out, steps(strides[1:], stride, out))
    column = grid((channels, *kernel), (strides[0], *steps(strides[1:], dilation, kernel)))
    return row, column


def pad(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """``x`` padded as a convolution pads it; ``padding`` as in `torch.nn.functional.pad`."""
    if not any(padding):
        return x
    return F.pad(x, list(padding), mode="constant" if mode == "zeros" else mode)
