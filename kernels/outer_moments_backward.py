"""``outer_moments_backward``: dL/dg from the recomputed g, drawn back to ``a`` and ``delta``.

Three matrix products a sample, as few as there can be: g, and the two that take dL/dg (kept for a
bounded number of samples) to delta and to a. One position (T = 1) needs no g: `_rank_one_kernel`.
"""

# ruff: noqa: E741  (O and I are shapes)

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import window as windows
from ..ops.moments import domain_of
from .launch import (
    STAGES,
    block,
    by_taps,
    gradient_like,
    launch,
    places_of,
    pointwise,
    precision,
    registers,
    side_by_side,
    summed_last,
    supports_outer,
    tile,
    warps,
)
from .launch import supports as plain
from .tiles import GATHER, MATRIX, TAPS, columns_at, load_delta, load_rows, tile_of

# Elements of dL/dg that exist at once (128 MiB of fp32).
UPSTREAM_ELEMENTS = 1 << 25


@triton.jit(do_not_specialize=["first", "taps"])
def _upstream_kernel(
    a, delta, order, domain, row, column, slope, level, upstream, first, T, T_delta, O, I,
    a_sample, a_row, a_column, taps, d_sample, d_row, d_column,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """``slope * g + level`` of one sample, one tile."""
    tiles = tl.cdiv(O, BLOCK_O) * tl.cdiv(I, BLOCK_I) * taps
    local = (tl.program_id(0) // tiles).to(tl.int64)
    sample = tl.load(order + first + local)
    o, i, tap = tile_of(tl.program_id(0) % tiles, O, I, taps, BLOCK_O, BLOCK_I)
    along_i = columns_at(column, i, tap, I, a_row, a_column, WINDOW)
    g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for begin in range(0, T, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        d = load_delta(delta + sample * d_sample, t, o, T_delta, O, d_row, d_column)
        x = load_rows(a + sample * a_sample, row, along_i, t, i, T, I, a_row, WINDOW)
        g = tl.dot(d, tl.trans(x), g, input_precision=PRECISION)
    inside = (o < O)[:, None] & (i < I)[None, :]
    width = I * taps if WINDOW == TAPS else I
    at = o[:, None] * width + i[None, :]
    if WINDOW == TAPS:
        at += tap * I
    block = tl.load(domain + first + local) * O * width
    g = g * tl.load(slope + block + at, mask=inside) + tl.load(level + block + at, mask=inside)
    tl.store(upstream + local * O * width + at, g, mask=inside)


# Loads and stores lie along channels: nothing is wider for a number of positions that 16 divides
@triton.jit(do_not_specialize=["first", "T", "taps"])
def _grad_delta_kernel(
    a, upstream, order, row, tap_offset, out, first, T, O, C, taps, a_sample, a_row,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[t, o] = sum_i a[t, i] upstream[o, i]`` of one sample, one tile; i = (tap, channel)."""
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles = tl.cdiv(T, BLOCK_T) * tiles_o
    local = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    t = tile // tiles_o * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tile % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    along_t = tl.load(row + t, mask=t < T, other=0) * a_row if WINDOW else t * a_row
    sample = tl.load(order + first + local)
    rows = a + sample * a_sample
    I = taps * C
    columns = upstream + local * O * I
    blocks = tl.cdiv(C, BLOCK_C)
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for step in range(taps * blocks):
        tap = step // blocks
        c = step % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        shift = 0
        if WINDOW:
            shift = tl.load(tap_offset + tap) * a_row
        x = tl.load(
            rows + (along_t[:, None] + (shift + c)[None, :]),
            mask=(t < T)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        h = tl.load(
            columns + (o[None, :] * I + (tap * C + c)[:, None]),
            mask=(c < C)[:, None] & (o < O)[None, :],
            other=0.0,
        )
        total = tl.dot(x.to(tl.float32), h, total, input_precision=PRECISION)
    at = (sample * T + t[:, None]) * O + o[None, :]
    tl.store(out + at, total, mask=(t < T)[:, None] & (o < O)[None, :])


@triton.jit(do_not_specialize=["first", "places", "T", "taps"])
def _grad_a_kernel(
    delta, upstream, order, position, source, out, first, places, T, O, C, taps,
    d_sample, d_row, out_sample, out_place, out_channel,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """``out[p, c] = sum_(tap, o) delta[t(p, tap), o] upstream[o, tap, c]`` of one sample and tile.

    Each element is gathered by the one program that writes it: no atomics, always the same bits.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles = tl.cdiv(places, BLOCK_P) * tiles_c
    local = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    p = tile // tiles_c * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    I = taps * C
    sample = tl.load(order + first + local)
    rows = delta + sample * d_sample
    base = upstream + local * O * I
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in range(taps):
        if WINDOW:
            t = tl.load(source + tap * places + p, mask=p < places, other=-1)
        else:
            t = tl.where(p < places, p, -1)
        if tl.max(t, 0) >= 0:  # with strides, a place sees few of the taps
            for begin in range(0, O, BLOCK_O):
                o = begin + tl.arange(0, BLOCK_O)
                d = tl.load(
                    rows + (t[:, None] * d_row + o[None, :]),
                    mask=(t >= 0)[:, None] & (o < O)[None, :], other=0.0,
                )  # fmt: skip
                h = tl.load(
                    base + (o[:, None] * I + (tap * C + c)[None, :]),
                    mask=(o < O)[:, None] & (c < C)[None, :], other=0.0,
                )  # fmt: skip
                total = tl.dot(d.to(tl.float32), h, total, input_precision=PRECISION)
    p_out = tl.load(position + p, mask=p < places, other=0) if WINDOW else p
    at = sample * out_sample + p_out[:, None] * out_place + c[None, :] * out_channel
    tl.store(out + at, total, mask=(p < places)[:, None] & (c < C)[None, :])


@triton.jit
def _rank_one_kernel(
    u, v, grad_mean, grad_variance, mean, order, offsets, out, N, U, V,
    u_sample, u_column, v_sample, v_column, m_domain, m_u, m_v, w_domain, w_u, w_v,
    BLOCK_U: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out = u * (v^2 slope) + v level`` for BLOCK_N samples of one domain, BLOCK_U columns.

    With g = u v^T, dL/dg = slope * g + level; slope = 2/n grad_variance, level = 1/n grad_mean -
    mean * slope. Strides m belong to grad_mean, w to grad_variance and mean.
    """
    tiles_u = tl.cdiv(U, BLOCK_U)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_u  # a domain can hold every sample; mostly it does not
    domain = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    start = tl.load(offsets + domain)
    samples = tl.load(offsets + domain + 1) - start
    begin = tile // tiles_u * BLOCK_N
    if begin < samples:
        n = begin + tl.arange(0, BLOCK_N)
        x = tile % tiles_u * BLOCK_U + tl.arange(0, BLOCK_U)
        sample = tl.load(order + start + n, mask=n < samples, other=0)
        scale = 1.0 / samples.to(tl.float32)
        by_slope = tl.zeros((BLOCK_U, BLOCK_N), tl.float32)
        by_level = tl.zeros((BLOCK_U, BLOCK_N), tl.float32)
        for first in range(0, V, BLOCK_V):
            y = first + tl.arange(0, BLOCK_V)
            inside = (x < U)[:, None] & (y < V)[None, :]
            at = domain * w_domain + x[:, None] * w_u + y[None, :] * w_v
            slope = tl.load(grad_variance + at, mask=inside, other=0.0).to(tl.float32)
            slope *= 2.0 * scale
            centre = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
            at = domain * m_domain + x[:, None] * m_u + y[None, :] * m_v
            level = tl.load(grad_mean + at, mask=inside, other=0.0).to(tl.float32)
            level = level * scale - centre * slope
            values = tl.load(
                v + (sample * v_sample)[None, :] + (y * v_column)[:, None],
                mask=(n < samples)[None, :] & (y < V)[:, None], other=0.0,
            ).to(tl.float32)  # fmt: skip
            by_slope = tl.dot(slope, values * values, by_slope, input_precision="tf32x3")
            by_level = tl.dot(level, values, by_level, input_precision="tf32x3")
        inside = (x < U)[:, None] & (n < samples)[None, :]
        factor = tl.load(
            u + (sample * u_sample)[None, :] + (x * u_column)[:, None], mask=inside, other=0.0
        ).to(tl.float32)
        at = sample[None, :] * U + x[:, None]
        tl.store(out + at, factor * by_slope + by_level, mask=inside)


def _rank_one(
    grad_mean: Tensor, grad_variance: Tensor, a: Tensor, delta: Tensor, mean: Tensor,
    order: Tensor, offsets: Tensor, of_a: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``(grad_a, grad_delta)``, ``[N, I]`` and ``[N, O]``."""
    a, delta, domains = a.flatten(1), delta.flatten(1), offsets.numel() - 1
    block_n = block(triton.cdiv(len(a), max(1, domains)), 64)
    grads = []
    # [D, O, I] is read with its last two dimensions swapped where the result is along I.
    for u, v, swap in ((delta, a, False), (a, delta, True))[: 2 if of_a else 1]:
        weights = [w.transpose(1, 2) if swap else w for w in (grad_mean, grad_variance, mean)]
        out = gradient_like(u, order)
        block_u = block(u.shape[1], 64)
        tiles = triton.cdiv(len(a), block_n) * triton.cdiv(u.shape[1], block_u)
        launch(
            _rank_one_kernel, domains * tiles,
            u, v, *weights, order, offsets, out, len(a), u.shape[1], v.shape[1],
            *u.stride(), *v.stride(), *weights[0].stride(), *weights[1].stride(),
            BLOCK_U=block_u, BLOCK_V=16, BLOCK_N=block_n, num_warps=4, num_stages=3,
        )  # fmt: skip
        grads.append(out)
    return grads[1] if of_a else a.new_empty(0), grads[0]


@lru_cache(maxsize=256)
def _geometry(
    channels: int, spatial: tuple[int, ...], window: tuple[int, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """Tables of a convolution whose patches are ordered (tap, channel): ``row [T]`` and ``column
    [I]`` of an input ``[C, *S]``; `places_of` an input; ``position [places]``, its places, ordered
    so that places of the same taps are neighbours; ``source [taps, places]``, the output position
    that reads a place through a tap, or -1."""
    kernel, stride, dilation = windows.split(window)
    places, taps = prod(spatial), prod(kernel)
    steps = [prod(spatial[j + 1 :]) for j in range(len(spatial))]
    row, column = windows.offsets(channels, spatial, (places, *steps), window, device)
    column = column.view(channels, taps).t().flatten()
    begin, tap = places_of(spatial, window, device)
    phase = torch.zeros(spatial, dtype=torch.int64, device=device)
    source = torch.zeros((*kernel, *spatial), dtype=torch.int64, device=device)
    outside = torch.zeros_like(source, dtype=torch.bool)
    dims = len(kernel)
    for j, out in enumerate(windows.positions(spatial, window)):
        place = torch.arange(spatial[j], device=device)
        shift = torch.arange(kernel[j], device=device).unsqueeze(1) * dilation[j]
        reach = place - shift  # [kernel, spatial]
        missed = (reach < 0) | (reach % stride[j] != 0) | (reach // stride[j] >= out)
        shape = [1] * (2 * dims)
        shape[j], shape[dims + j] = kernel[j], spatial[j]
        source = source * out + (reach // stride[j]).view(shape)
        outside |= missed.view(shape)
        phase = phase * stride[j] + (place % stride[j]).view(shape[dims:])
    position = phase.flatten().argsort(stable=True)
    source = source.masked_fill(outside, -1).view(taps, places)[:, position]
    return row, column, begin, tap, position.int(), source.int().contiguous()


def outer_moments_backward(
    grad_mean: Tensor, grad_variance: Tensor, a: Tensor, delta: Tensor, mean: Tensor,
    order: Tensor, offsets: Tensor, of_a: bool, window: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradient of `outer_moments`; without ``of_a`` nothing is computed for `a`."""
    if more := windows.padding(window):
        whole, window = windows.fill(a, window)
        args = grad_mean, grad_variance, whole, delta, mean, order, offsets, of_a, window
        of_whole, grad_delta = outer_moments_backward(*args)
        return windows.crop(of_whole, more).contiguous() if of_a else of_whole, grad_delta
    grad_variance, mean = grad_variance.contiguous(), mean.contiguous()
    if not window and a.shape[1:-1].numel() == 1:  # T is 1, or missing
        grads = _rank_one(grad_mean, grad_variance, a, delta, mean, order, offsets, of_a)
        return grads[0].view(a.shape) if of_a else grads[0], grads[1].view(delta.shape)
    grad_a = gradient_like(a, order) if of_a else a.new_empty(0)
    grad_delta = gradient_like(delta, order)
    if mean.numel() == 0 or delta.numel() == 0 or order.numel() == 0:
        return grad_a.zero_(), grad_delta.zero_()
    count = (offsets[1:] - offsets[:-1]).clamp(min=1).view(-1, 1, 1)
    slope = grad_variance * (2 / count)
    level = torch.addcmul(grad_mean / count, mean, slope, value=-1).contiguous()
    precise, channels_first = precision(a, window), bool(window)
    a, window = pointwise(a, window, strided=False)
    (T, I), O = windows.sizes(a.shape, window), delta.shape[2]
    x, d, T_x, T_d = summed_last(a, delta, window)
    last = side_by_side(a.flatten(2).transpose(1, 2) if window else a)
    C, taps, places = I, 1, T
    row, column, begin, tap, position, source = (order,) * 6  # not read
    width, at, read = I, (*x.stride(), 1), MATRIX.value
    if window:
        C, read = a.shape[1], (TAPS if by_taps(a, window) else GATHER).value
        tables = _geometry(C, tuple(a.shape[2:]), tuple(window), a.device)
        row, column, begin, tap, position, source = tables
        taps, places = source.shape
        pair = (w.unflatten(2, (C, taps)).transpose(2, 3) for w in (slope, level))
        slope, level = (w.flatten(2) for w in pair)
        if by_taps(a, window):
            x, row, column, width, at = last, begin, tap, C, (*last.stride(), taps)
        else:
            x = a.contiguous()
            at = x.stride(0), 0, 0, 1
    delta, samples, domain = side_by_side(delta), order.numel(), domain_of(order, offsets)
    chunk = min(samples, max(1, UPSTREAM_ELEMENTS // (O * I)))
    upstream = slope.new_empty((chunk, O, I))

    def run(
        kernel: Any, rows: int, columns: int, times: int, *args: Any, read: Any, names: Any
    ) -> None:
        """One launch for ``now`` samples, tiled over ``times`` results ``[rows, columns]``."""
        sides = tile(rows, columns, precise, a, window)
        blocks = dict(zip(names, sides, strict=True))
        tiles = triton.cdiv(rows, sides[0]) * triton.cdiv(columns, sides[1]) * times
        launch(
            kernel, now * tiles, *args, WINDOW=read, PRECISION=precise, **registers(a.device, 248),
            num_warps=warps(*sides[:2]), num_stages=STAGES if read else 3, **blocks,
        )  # fmt: skip

    for first in range(0, samples, chunk):
        now = min(chunk, samples - first)
        run(
            _upstream_kernel, O, width, at[3],
            x, d, order, domain, row, column, slope, level, upstream, first, T_x, T_d, O, width,
            *at, *d.stride(), read=read, names=("BLOCK_O", "BLOCK_I", "BLOCK_T"),
        )  # fmt: skip
        run(
            _grad_delta_kernel, T, O, 1,
            last, upstream, order, begin, tap, grad_delta, first, T, O, C, taps,
            *last.stride()[:2], read=bool(window), names=("BLOCK_T", "BLOCK_O", "BLOCK_C"),
        )  # fmt: skip
        if of_a:
            run(
                _grad_a_kernel, places, C, 1,
                delta, upstream, order, position, source, grad_a, first, places, T, O, C, taps,
                *delta.stride()[:2], C * places, *((1, places) if channels_first else (C, 1)),
                read=bool(window), names=("BLOCK_P", "BLOCK_C", "BLOCK_O"),
            )  # fmt: skip
    return grad_a, grad_delta


def supports(
    grad_mean: Tensor, grad_variance: Tensor, a: Tensor, delta: Tensor, mean: Tensor, *args: Any
) -> str | None:
    """`launch.supports_outer` of the forward's arguments, and statistics, which are fp32."""
    return supports_outer(a, delta, *args) or plain(grad_mean, grad_variance, mean)
