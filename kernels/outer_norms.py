"""``outer_norms``: squared norms of per-sample gradients that are sums of outer products."""

# ruff: noqa: E741  (O and I are shapes)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.window import sizes
from .launch import (
    address,
    block,
    columns,
    launch,
    pointwise,
    precision,
    side_by_side,
    summed_last,
    supports_outer,
    tile,
    warps,
)
from .tiles import columns_at, load_delta, load_rows, tile_of

supports = supports_outer


@triton.jit(do_not_specialize=["taps"])
def _direct_kernel(
    a, delta, row, column, partial, T, T_delta, O, I,
    a_sample, a_row, a_column, taps, d_sample, d_row, d_column,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum of squares of one tile of one sample's gradient."""
    tiles = tl.cdiv(O, BLOCK_O) * tl.cdiv(I, BLOCK_I) * taps
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    o, i, tap = tile_of(tl.program_id(0) % tiles, O, I, taps, BLOCK_O, BLOCK_I)
    along_i = columns_at(column, i, tap, I, a_row, a_column, WINDOW)
    g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for begin in range(0, T, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        d = load_delta(delta + sample * d_sample, t, o, T_delta, O, d_row, d_column)
        x = load_rows(a + sample * a_sample, row, along_i, t, i, T, I, a_row, WINDOW)
        g = tl.dot(d, tl.trans(x), g, input_precision=PRECISION)
    tl.store(partial + tl.program_id(0), tl.sum(g * g))


@triton.jit(do_not_specialize=["taps"])
def _gram_kernel(
    a, delta, row, column, partial, T, O, I,
    a_sample, a_row, a_column, taps, d_sample, d_row, d_column,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum of ``<delta_t, delta_s> <a_t, a_s>`` over one tile of positions t >= s of one sample."""
    blocks = tl.cdiv(T, BLOCK_T)
    sample = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    later = tl.program_id(0) // blocks % blocks
    earlier = tl.program_id(0) % blocks
    result = 0.0
    if later >= earlier:
        t = later * BLOCK_T + tl.arange(0, BLOCK_T)
        s = earlier * BLOCK_T + tl.arange(0, BLOCK_T)
        d_base, a_base = delta + sample * d_sample, a + sample * a_sample
        of_delta = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        of_a = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
        for begin in range(0, O, BLOCK_K):
            o = begin + tl.arange(0, BLOCK_K)
            d_t = load_delta(d_base, t, o, T, O, d_row, d_column)
            d_s = load_delta(d_base, s, o, T, O, d_row, d_column)
            of_delta = tl.dot(tl.trans(d_t), d_s, of_delta, input_precision=PRECISION)
        blocks_i = tl.cdiv(I, BLOCK_K)
        for step in range(taps * blocks_i):
            tap = step // blocks_i
            i = step % blocks_i * BLOCK_K + tl.arange(0, BLOCK_K)
            along_i = columns_at(column, i, tap, I, a_row, a_column, WINDOW)
            a_t = load_rows(a_base, row, along_i, t, i, T, I, a_row, WINDOW)
            a_s = load_rows(a_base, row, along_i, s, i, T, I, a_row, WINDOW)
            of_a = tl.dot(tl.trans(a_t), a_s, of_a, input_precision=PRECISION)
        result = tl.sum(of_delta * of_a) * tl.where(later > earlier, 2.0, 1.0)
    tl.store(partial + tl.program_id(0), result)


@triton.jit
def _one_position_kernel(
    a, delta, out, O, I, a_sample, a_column, d_sample, d_column, BLOCK: tl.constexpr
):  # fmt: skip
    """``|delta|^2 |a|^2`` of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    of_delta = tl.zeros((BLOCK,), tl.float32)
    of_a = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, O, BLOCK):
        o = begin + tl.arange(0, BLOCK)
        d = tl.load(delta + sample * d_sample + o * d_column, mask=o < O, other=0.0)
        d = d.to(tl.float32)
        of_delta += d * d
    for begin in range(0, I, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(a + sample * a_sample + i * a_column, mask=i < I, other=0.0).to(tl.float32)
        of_a += x * x
    tl.store(out + sample, tl.sum(of_delta) * tl.sum(of_a))


def outer_norms(a: Tensor, delta: Tensor, window: Sequence[int]) -> Tensor:
    """See `fastdg.ops.outer_norms`."""
    N, O = a.shape[0], delta.shape[2]
    if a.shape[1] == 1 and not window:
        norms = a.new_empty((N,), dtype=torch.float32)
        launch(
            _one_position_kernel, N, a, delta, norms, O, a.shape[2],
            a.stride(0), a.stride(2), delta.stride(0), delta.stride(2), BLOCK=512,
        )  # fmt: skip
        return norms
    precise = precision(a, window)
    a, window = pointwise(a, window)
    T, I = sizes(a.shape, window)
    width, taps = columns(a, window)
    if T * (I + O) <= O * I:
        block_t = block(T, 64)
        blocks = triton.cdiv(T, block_t)
        delta = side_by_side(delta)
        x, row, column, *strides, read = address(a if window else side_by_side(a), window)
        partial = a.new_empty((N, blocks * blocks), dtype=torch.float32)
        launch(
            _gram_kernel, partial.numel(), x, delta, row, column, partial, T, O, width,
            *strides, *delta.stride(),
            WINDOW=read, PRECISION=precise,
            BLOCK_T=block_t, BLOCK_K=32 if precise == "tf32" else 16, num_warps=4, num_stages=3,
        )  # fmt: skip
        return partial.sum(1).clamp_(min=0)
    block_o, block_i, block_t = tile(O, width, precise, a, window)
    tiles = triton.cdiv(O, block_o) * triton.cdiv(width, block_i) * taps
    a, delta, T, T_delta = summed_last(a, delta, window)
    x, row, column, *strides, read = address(a, window)
    partial = a.new_empty((N, tiles), dtype=torch.float32)
    launch(
        _direct_kernel, partial.numel(), x, delta, row, column, partial, T, T_delta, O, width,
        *strides, *delta.stride(),
        WINDOW=read, PRECISION=precise, BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_T=block_t,
        num_warps=warps(block_o, block_i), num_stages=3,
    )  # fmt: skip
    return partial.sum(1)
