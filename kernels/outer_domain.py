"""``outer_domain``: the mean gradient of every domain, one grouped matrix product.

With SQUARES the same kernel serves ``outer_moments`` at T = 1, where the squares of gradients are
products, too: of delta * delta and a * a. Where the samples agree and their difference cancels, the
tile is computed once more, sample by sample.
"""

# ruff: noqa: E741  (O and I are shapes)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.window import sizes
from .launch import (
    STAGES,
    block,
    columns,
    launch,
    paired,
    pairs,
    parts,
    pointwise,
    precision,
    registers,
    supports_outer,
    tile,
    warps,
)
from .tiles import (
    add_sample,
    columns_at,
    finish_kernel,
    load_pairs,
    place,
    result_at,
    samples_of,
    tile_of,
)

supports = supports_outer

# Below this share of mean^2, E[g^2] - mean^2 has lost three digits or more
CANCELS = tl.constexpr(1 / 256)


@triton.jit(do_not_specialize=["split", "taps"])  # one depends on the batch size
def _outer_domain_kernel(
    a, delta, order, offsets, row, column, mean, variance, partial, slab, split, T, O, I,
    a_sample, a_row, a_column, taps, d_sample, d_row, d_column,
    WINDOW: tl.constexpr, SQUARES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_O, BLOCK_I] of one domain; sums over its (sample, position) pairs."""
    tiles = tl.cdiv(O, BLOCK_O) * tl.cdiv(I, BLOCK_I) * taps
    o, i, tap = tile_of(tl.program_id(0) % tiles, O, I, taps, BLOCK_O, BLOCK_I)
    part = tl.program_id(0) // tiles % split
    domain = (tl.program_id(0) // tiles // split).to(tl.int64)
    first = tl.load(offsets + domain)
    samples = (tl.load(offsets + domain + 1) - first).to(tl.int32)
    start, end = samples_of(part, split, samples * T, BLOCK_K)
    along_i = columns_at(column, i, tap, I, a_row, a_column, WINDOW)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for begin in range(start, end, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        d, x = load_pairs(
            a, delta, order, row, first, k, end, along_i, o, i, T, O, I,
            a_sample, a_row, d_sample, d_row, d_column, WINDOW,
        )  # fmt: skip
        if SQUARES:
            d = d.to(tl.float32)  # a square may not fit a half
            x = x.to(tl.float32)
            second = tl.dot(d * d, tl.trans(x * x), second, input_precision=PRECISION)
        total = tl.dot(d, tl.trans(x), total, input_precision=PRECISION)
    inside = (o < O)[:, None] & (i < I)[None, :]
    at = result_at(o, i, tap, I, taps, WINDOW)
    mean += domain * O * I * taps
    variance += domain * O * I * taps
    if SQUARES:
        average = total / tl.maximum(end - start, 1).to(tl.float32)
        second = tl.maximum(second - average * total, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if end - start == 1:
            second = total - total  # 0, or NaN where a value is not finite
        cancels = inside & (second < average * total * CANCELS)
        if (end - start > 1) & (tl.max(cancels.to(tl.int32)) > 0):
            total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
            second = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
            for n in range(start, end):
                sample = tl.load(order + first + n)
                x = tl.load(a + sample * a_sample + place(along_i, WINDOW), mask=i < I, other=0.0)
                d = tl.load(delta + sample * d_sample + o * d_column, mask=o < O, other=0.0)
                g = d.to(tl.float32)[:, None] * x.to(tl.float32)[None, :]
                total, second = add_sample(total, second, g, n - start)
    if split == 1:
        count = tl.maximum(samples, 1).to(tl.float32)
        tl.store(mean + at, total / count, mask=inside)
        if SQUARES:
            tl.store(variance + at, second / count, mask=inside)
    else:
        powers: tl.constexpr = 2 if SQUARES else 1
        partial += part.to(tl.int64) * powers * slab + domain * O * I * taps
        tl.store(partial + at, total, mask=inside)
        if SQUARES:
            tl.store(partial + slab + at, second, mask=inside)


def grouped_product(
    a: Tensor,
    delta: Tensor,
    order: Tensor,
    offsets: Tensor,
    window: Sequence[int],
    squares: bool,
) -> tuple[Tensor, Tensor]:
    """Mean and, with ``squares`` (T = 1 only), variance ``[D, O, I]``; else the mean twice."""
    # One position: bound by memory, where the accuracy of fp32 costs nothing.
    precise = "tf32x3" if squares else precision(a, window)
    a, window = pointwise(a, window)
    T, inputs = sizes(a.shape, window)
    outputs, domains = delta.shape[2], offsets.numel() - 1
    width, taps = columns(a, window)
    mean = a.new_empty((domains, outputs, inputs), dtype=torch.float32)
    variance = torch.empty_like(mean) if squares else mean
    if mean.numel() == 0 or T == 0:
        return mean.zero_(), variance.zero_()
    if squares:
        block_o, block_i, block_k = block(outputs, 64), block(width, 64), 16
    else:
        block_o, block_i, block_k = tile(outputs, width, precise, a, window)
        block_k = pairs(block_k, a, window)
    tiles = triton.cdiv(outputs, block_o) * triton.cdiv(width, block_i) * taps
    steps = triton.cdiv(triton.cdiv(a.shape[0], domains) * T, block_k)
    powers = 2 if squares else 1
    share = parts(domains * tiles, steps, powers * mean.numel(), a.device)
    partial = mean.new_empty((share, powers, *mean.shape)) if share > 1 else mean
    (x, row, column, *strides, read), delta, T = paired(a, delta, window)
    launch(
        _outer_domain_kernel, domains * tiles * share,
        x, delta, order, offsets, row, column, mean, variance, partial, mean.numel(), share, T,
        outputs, width,
        *strides, *delta.stride(),
        WINDOW=read, SQUARES=squares,
        PRECISION=precise,
        BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_K=block_k,
        num_warps=8 if squares else warps(block_o, block_i), num_stages=3 if squares else STAGES,
        **registers(x.device, 128),
    )  # fmt: skip
    finish(partial, offsets, mean, variance, share, block_k if squares else 0)
    return mean, variance


def finish(
    partial: Tensor, offsets: Tensor, mean: Tensor, variance: Tensor, share: int, samples: int
) -> None:
    """Merge the ``share`` parts in ``partial``, where there is more than one; with squares, a part
    is of blocks of ``samples``."""
    if share > 1:
        domains, size = mean.shape[0], mean[0].numel()
        launch(
            finish_kernel, domains * triton.cdiv(size, 512),
            partial, offsets, mean, variance, size, mean.numel(),
            share, SQUARES=samples > 0, BLOCK=512, SHARE=max(1, samples),
        )  # fmt: skip


def outer_domain(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> Tensor:
    """See `fastdg.ops.outer_domain`."""
    return grouped_product(a, delta, order, offsets, window, squares=False)[0]
