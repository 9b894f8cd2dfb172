"""``outer_agreement``: the domains' mean gradients combined where their signs agree.

A program keeps one tile of a weight and goes through the domains: each domain's mean is summed in
registers, counted and forgotten. Weights of too few tiles for the device are summed by
``outer_domain``, which shares out domains and samples too, and combined by ``agreement``.
"""

# ruff: noqa: E741  (O and I are shapes)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.window import sizes
from .agreement import agreement, count_domain, store_agreed
from .launch import (
    by_taps,
    columns,
    fills,
    launch,
    paired,
    pairs,
    pointwise,
    precision,
    stages,
    supports_outer,
    tile,
    warps,
)
from .launch import supports as plain
from .outer_domain import grouped_product
from .tiles import columns_at, load_pairs, result_at, tile_of


@triton.jit(do_not_specialize=["taps"])
def _outer_agreement_kernel(
    a, delta, order, offsets, row, column, weights, combined, agreeing, magnitude,
    threshold, steepness, domains, T, O, I, a_sample, a_row, a_column, taps,
    d_sample, d_row, d_column,
    WINDOW: tl.constexpr, SOFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_O, BLOCK_I]; each domain's mean lives in registers only."""
    o, i, tap = tile_of(tl.program_id(0), O, I, taps, BLOCK_O, BLOCK_I)
    along_i = columns_at(column, i, tap, I, a_row, a_column, WINDOW)
    count = 0.0
    balance = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    mean = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for domain in range(domains):
        weight = tl.load(weights + domain).to(tl.float32)
        if weight != 0:
            first = tl.load(offsets + domain)
            samples = (tl.load(offsets + domain + 1) - first).to(tl.int32)
            end = samples * T
            g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
            for begin in range(0, end, BLOCK_K):
                k = begin + tl.arange(0, BLOCK_K)
                d, x = load_pairs(
                    a, delta, order, row, first, k, end, along_i, o, i, T, O, I,
                    a_sample, a_row, d_sample, d_row, d_column, WINDOW,
                )  # fmt: skip
                g = tl.dot(d, tl.trans(x), g, input_precision=PRECISION)
            g = g / tl.maximum(samples, 1).to(tl.float32)
            count, balance, total, mean, second = count_domain(
                g, weight, count, balance, total, mean, second, SOFT
            )
    inside = (o < O)[:, None] & (i < I)[None, :]
    store_agreed(
        combined, agreeing, magnitude, result_at(o, i, tap, I, taps, WINDOW), inside,
        count, balance, total, second, threshold, steepness, SOFT,
    )  # fmt: skip


def outer_agreement(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, weights: Tensor,
    threshold: float, steepness: float, window: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fastdg.ops.outer_agreement`."""
    precise = precision(a, window)
    rows, places = pointwise(a, window)
    outputs, inputs, domains = delta.shape[2], sizes(a.shape, window)[1], offsets.numel() - 1
    soft = not math.isinf(steepness)
    width, taps = columns(rows, places)
    gathered = places and not by_taps(rows, places)
    block_o, block_i, block_k = tile(outputs, width, precise, rows, places)
    if soft or (gathered and block_i > 64):  # two more accumulators; where each position is
        block_o = min(block_o, 64)
    if by_taps(rows, places) or (soft and gathered):  # no two columns of a tap lie side by side
        block_i = min(block_i, 64)
    block_k = pairs(block_k, rows, places)
    tiles = triton.cdiv(outputs, block_o) * triton.cdiv(width, block_i) * taps
    if not fills(tiles, a.device):
        means, _ = grouped_product(a, delta, order, offsets, window, squares=False)
        (combined,), *of_one = agreement(means.unbind(), weights, threshold, steepness)
        agreeing, magnitude = (total.squeeze(0) for total in of_one)
        return combined, agreeing, magnitude
    combined = a.new_empty((outputs, inputs), dtype=torch.float32)
    sums = a.new_empty((2, tiles), dtype=torch.float32)
    (x, row, column, *strides, read), delta, T = paired(rows, delta, places)
    launch(
        _outer_agreement_kernel, tiles,
        x, delta, order, offsets, row, column, weights, combined, *sums.unbind(),
        threshold, steepness if soft else 0.0, domains, T, outputs, width,
        *strides, *delta.stride(),
        WINDOW=read, SOFT=soft, PRECISION=precise,
        BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_K=block_k,
        num_warps=8 if soft else warps(block_o, block_i),
        num_stages=stages(a.device, bool(gathered)),
    )  # fmt: skip
    agreeing, magnitude = sums.sum(1).unbind()  # of terms >= 0: pairwise in fp32 is enough
    return combined, agreeing, magnitude


def supports(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, weights: Tensor, *args: Any
) -> str | None:
    """`launch.supports_outer`, and weights, which may have another of the dtypes."""
    return plain(weights) or supports_outer(a, delta, order, offsets, args[-1])
