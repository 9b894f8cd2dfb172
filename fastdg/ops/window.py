"""The geometry of a convolution seen as an outer product.

A convolution's weight gradient for sample i is ``sum_t delta[i, t] (x) patch[i, t]`` with one
patch per output position. ``window = [*kernel, *stride, *dilation]`` describes the patches of a
padded input ``a [N, C, *S]``, and ``[*kernel, *stride, *dilation, *padding]`` those of an input
that lacks these zeros on both sides; an empty ``window`` means that ``a [N, T, I]`` holds the rows
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

PADDED = (4, 8, 12)  # lengths of windows with padding, in one to three dimensions
MOST_TAPS = 31  # of a patch whose places outside kernels mask: a bit each


def split(window: Sequence[int]) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Return ``(kernel, stride, dilation)``, each with one entry per spatial dimension."""
    dims = len(window) // (4 if len(window) in PADDED else 3)
    return window[:dims], window[dims : 2 * dims], window[2 * dims : 3 * dims]


def padding(window: Sequence[int]) -> Sequence[int]:
    """Return the padding of each spatial dimension; empty for a window of a padded input."""
    return window[len(window) // 4 * 3 :] if len(window) in PADDED else ()


def extent(spatial: Sequence[int], window: Sequence[int]) -> list[int]:
    """Return the sizes of an input after padding."""
    more = padding(window) or [0] * len(spatial)
    return [size + 2 * p for size, p in zip(spatial, more, strict=True)]


def fill(a: Tensor, window: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    """Return a padded input, and its window."""
    if more := padding(window):
        a = F.pad(a, [p for size in reversed(more) for p in (size, size)])
        window = window[: -len(more)]
    return a, window


def crop(a: Tensor, more: Sequence[int]) -> Tensor:
    """Return a padded input without its padding."""
    for j, p in enumerate(more):
        a = a.narrow(2 + j, p, a.shape[2 + j] - 2 * p)
    return a


def positions(spatial: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Output positions along each spatial dimension."""
    kernel, stride, dilation = split(window)
    if len(window) in PADDED:
        spatial = extent(spatial, window)
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
    a, window = fill(a, window)
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
    if more := padding(window):
        whole = fold(rows, (*a_shape[:2], *extent(a_shape[2:], window)), window[: -len(more)])
        return crop(whole, more)
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


@lru_cache(maxsize=256)
def masked_offsets(
    channels: int,
    spatial: tuple[int, ...],
    strides: tuple[int, ...],
    window: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`offsets` for a window with padding, 64 bits each: the upper 32 bits of ``row`` have a bit
    for each tap inside the input, those of ``column`` the tap's bit; the lower the offset."""
    kernel, stride, dilation = split(window)
    more, whole = padding(window), tuple(extent(spatial, window))
    row, column = offsets(channels, whole, strides, window[: -len(more)], torch.device("cpu"))
    row = row.long() - sum(p * s for p, s in zip(more, strides[1:], strict=True))
    places = positions(spatial, window)
    there = torch.ones((), dtype=torch.bool)  # [*positions, *kernel], dimension after dimension
    for j, size in enumerate(spatial):
        at = torch.arange(places[j]) * stride[j] - more[j]
        at = at.unsqueeze(1) + torch.arange(kernel[j]) * dilation[j]
        shape = [1] * (2 * len(spatial))
        shape[j], shape[len(spatial) + j] = at.shape
        there = there & ((at >= 0) & (at < size)).view(shape)
    taps = 1 << torch.arange(prod(kernel))
    bits = (there.reshape(len(row), len(taps)) * taps).sum(1)
    row = (bits << 32) | (row & 0xFFFFFFFF)
    column = (taps.repeat(channels) << 32) | column.long()
    return row.to(device), column.to(device)


def pad(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """``x`` padded as a convolution pads it; ``padding`` as in `torch.nn.functional.pad`."""
    if not any(padding):
        return x
    return F.pad(x, list(padding), mode="constant" if mode == "zeros" else mode)
