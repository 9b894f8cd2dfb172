"""``outer_moments``: moments of gradients that are sums of outer products, never stored."""

# ruff: noqa: E741  (O and I are shapes)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.outer_moments import with_positions
from ..ops.window import sizes
from .launch import (
    STAGES,
    address,
    block,
    by_taps,
    columns,
    launch,
    parts,
    pointwise,
    precision,
    registers,
    summed_last,
    supports_outer,
    tile,
    warps,
)
from .outer_domain import finish, grouped_product
from .tiles import (
    add_sample,
    columns_at,
    load_delta,
    load_rows,
    meet,
    place,
    result_at,
    rows_at,
    samples_of,
    tile_of,
)

# Below this many positions a padded tl.dot (K >= 16) does more work than plain multiply-adds.
DOT_POSITIONS = 8

supports = supports_outer


@triton.jit(do_not_specialize=["split", "taps"])  # one depends on the batch size
def _outer_moments_kernel(
    a, delta, order, offsets, row, column, mean, variance, partial, slab, split, T, T_delta, O, I,
    a_sample, a_row, a_column, taps, d_sample, d_row, d_column,
    WINDOW: tl.constexpr, POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_O, BLOCK_I] of one domain; each sample's gradient lives in registers only.

    POSITIONS is T where T is small, else 0: then one loop runs over all (sample, block of
    positions), so that loads for the next sample are under way while the last one ends.
    """
    tiles = tl.cdiv(O, BLOCK_O) * tl.cdiv(I, BLOCK_I) * taps
    o, i, tap = tile_of(tl.program_id(0) % tiles, O, I, taps, BLOCK_O, BLOCK_I)
    part = tl.program_id(0) // tiles % split
    domain = (tl.program_id(0) // tiles // split).to(tl.int64)
    first = tl.load(offsets + domain)
    samples = (tl.load(offsets + domain + 1) - first).to(tl.int32)
    begin, end = samples_of(part, split, samples, 1)
    along_i = columns_at(column, i, tap, I, a_row, a_column, WINDOW)
    g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if POSITIONS > 0:
        for n in range(begin, end):
            sample = tl.load(order + first + n)
            g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
            for t in tl.static_range(POSITIONS):
                along_t = rows_at(row, t, t < T, a_row, WINDOW)
                at = place(along_t, WINDOW) + place(along_i, WINDOW)
                inside = meet(along_i, along_t, i < I, WINDOW)
                x = tl.load(a + sample * a_sample + at, mask=inside, other=0.0)
                d = tl.load(
                    delta + sample * d_sample + t * d_row + o * d_column, mask=o < O, other=0.0
                )
                g += d.to(tl.float32)[:, None] * x.to(tl.float32)[None, :]
            total, second = add_sample(total, second, g, n - begin)
    else:
        blocks = tl.cdiv(T, BLOCK_T)
        for step in range((end - begin) * blocks):
            # From the step alone: a load that depends on the `if` below could not come before it
            block = step % blocks
            sample = tl.load(order + first + begin + step // blocks)
            t = block * BLOCK_T + tl.arange(0, BLOCK_T)
            d = load_delta(delta + sample * d_sample, t, o, T_delta, O, d_row, d_column)
            x = load_rows(a + sample * a_sample, row, along_i, t, i, T, I, a_row, WINDOW)
            g = tl.dot(d, tl.trans(x), g, input_precision=PRECISION)
            if block == blocks - 1:
                total, second = add_sample(total, second, g, step // blocks)
                g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    inside = (o < O)[:, None] & (i < I)[None, :]
    at = result_at(o, i, tap, I, taps, WINDOW)
    mean += domain * O * I * taps
    variance += domain * O * I * taps
    if split == 1:
        count = tl.maximum(samples, 1).to(tl.float32)
        tl.store(mean + at, total / count, mask=inside)
        tl.store(variance + at, second / count, mask=inside)
    else:
        partial += part.to(tl.int64) * 2 * slab + domain * O * I * taps
        tl.store(partial + at, total, mask=inside)
        tl.store(partial + slab + at, second, mask=inside)


def outer_moments(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """See `fastdg.ops.outer_moments`."""
    a, delta = with_positions(a, delta)
    if a.shape[1] == 1 and not window:
        return grouped_product(a, delta, order, offsets, window, squares=True)
    precise = precision(a, window)
    a, window = pointwise(a, window)
    T, inputs = sizes(a.shape, window)
    outputs, domains = delta.shape[2], offsets.numel() - 1
    width, taps = columns(a, window)
    mean = a.new_empty((domains, outputs, inputs), dtype=torch.float32)
    variance = torch.empty_like(mean)
    if mean.numel() == 0 or T == 0:
        return mean.zero_(), variance.zero_()
    by_dot = T >= DOT_POSITIONS
    if by_dot:
        block_o, block_i, block_t = tile(outputs, width, precise, a, window)
        if by_taps(a, window):  # no two columns of a tap lie side by side in the result
            block_i = min(block_i, 64)
    else:
        block_o, block_i, block_t = block(outputs, 64), block(width, 64), 1
    tiles = triton.cdiv(outputs, block_o) * triton.cdiv(width, block_i) * taps
    share = parts(domains * tiles, triton.cdiv(a.shape[0], domains), 2 * mean.numel(), a.device)
    partial = mean.new_empty((share, 2, *mean.shape)) if share > 1 else mean
    T_delta = T
    if by_dot:
        a, delta, T, T_delta = summed_last(a, delta, window)
    x, row, column, *strides, read = address(a, window)
    launch(
        _outer_moments_kernel, domains * tiles * share,
        x, delta, order, offsets, row, column, mean, variance, partial, mean.numel(),
        share, T, T_delta, outputs, width,
        *strides, *delta.stride(),
        WINDOW=read, POSITIONS=0 if by_dot else T,
        PRECISION=precise,
        BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_T=block_t,
        num_warps=warps(block_o, block_i) if by_dot else 8, num_stages=STAGES,
        **registers(x.device, 248),
    )  # fmt: skip
    finish(partial, offsets, mean, variance, share, 1)
    return mean, variance
