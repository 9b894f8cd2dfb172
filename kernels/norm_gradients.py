"""``norm_gradients``: a norm's weight and bias, by tiles of channels and positions.

``foreach_norm_gradients``: those of many norms, one launch for all whose maps lie alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from ..ops.gradients import by_rows, gradient_like
from .launch import block, integers, launch, parts
from .launch import supports as plain

TILE = 1024  # elements of a tile
_Maps = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # x, delta, mean, rstd


@triton.jit
def _norm_sums_kernel(
    x, delta, mean, rstd, table, weight, bias,
    N, T, C, S, size, splits, chunk, eps,
    x_sample, x_row, x_channel, x_position, d_sample, d_row, d_channel, d_position,
    m_sample, m_row, m_group, r_sample, r_row, r_group,
    MANY: tl.constexpr, MEAN: tl.constexpr, RSTD: tl.constexpr, VARIANCE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One sample's block of channels over one chunk of all rows' positions; with MANY of the norm
    whose maps a row of the table points to."""
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    row = (program // (blocks * splits)).to(tl.int64)  # sample after sample, norm after norm
    sample = row
    if MANY:
        sample = row % N
        place = table + row // N * 4
        x = tl.multiple_of(tl.load(place).to(tl.pointer_type(x.dtype.element_ty)), 16)
        delta = tl.load(place + 1).to(tl.pointer_type(delta.dtype.element_ty))
        delta = tl.multiple_of(delta, 16)
        mean = tl.load(place + 2).to(tl.pointer_type(mean.dtype.element_ty))
        rstd = tl.load(place + 3).to(tl.pointer_type(rstd.dtype.element_ty))
    split = program // blocks % splits
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel, group = c.to(tl.int64)[:, None], (c // size)[:, None]
    of_weight = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    of_bias = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    first = split * chunk
    last = tl.minimum(T * S, first + chunk)
    for begin in range(first, last, BLOCK_P):
        p = (begin + tl.arange(0, BLOCK_P))[None, :]
        t, s = p // S, p % S
        inside = (c < C)[:, None] & (p < last)
        at = x + sample * x_sample + channel * x_channel + t * x_row + s * x_position
        h = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = delta + sample * d_sample + channel * d_channel + t * d_row + s * d_position
        d = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            at = mean + sample * m_sample + t * m_row + group * m_group
            h -= tl.load(at, mask=inside, other=0.0)
        if RSTD:
            at = rstd + sample * r_sample + t * r_row + group * r_group
            if VARIANCE:  # 1 outside: of 0 the reciprocal is inf, and 0 * inf is NaN
                h *= 1.0 / tl.sqrt_rn(tl.load(at, mask=inside, other=1.0) + eps)
            else:
                h *= tl.load(at, mask=inside, other=0.0)
        of_weight += d * h
        of_bias += d
    at = (row * splits + split) * C + c
    tl.store(weight + at, tl.sum(of_weight, 1), mask=c < C)
    tl.store(bias + at, tl.sum(of_bias, 1), mask=c < C)


@triton.jit
def _norm_gradient_kernel(
    x, delta, up, mean, rstd, slope, shift, gain, of_x, of_delta, of_gain,
    T, C, S, size, share, eps,
    x_sample, x_row, x_channel, x_position, d_sample, d_row, d_channel, d_position,
    u_sample, u_row, u_channel, u_position, m_sample, m_row, m_group, r_sample, r_row, r_group,
    to_sample, to_row, to_channel, to_position,
    MEAN: tl.constexpr, RSTD: tl.constexpr, VARIANCE: tl.constexpr, OWN: tl.constexpr,
    UP: tl.constexpr, GAIN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One group of one row of one sample: its sums first, if they are the input's own, and then
    the gradients; by the formula of `reference_backward`, with the means as sums."""
    groups = C // size
    program = tl.program_id(0)
    sample = (program // (T * groups)).to(tl.int64)
    t, group = (program // groups % T).to(tl.int64), (program % groups).to(tl.int64)
    x += sample * x_sample + t * x_row
    delta += sample * d_sample + t * d_row
    up += sample * u_sample + t * u_row
    of_x += sample * to_sample + t * to_row
    of_delta += sample * to_sample + t * to_row
    centre, scale = 0.0, 1.0
    if MEAN:
        centre = tl.load(mean + sample * m_sample + t * m_row + group * m_group)
    if RSTD:
        scale = tl.load(rstd + sample * r_sample + t * r_row + group * r_group)
        scale = 1.0 / tl.sqrt_rn(scale + eps) if VARIANCE else scale
    level, tilt, of_up, up_level, up_tilt = 0.0, 0.0, 0.0, 0.0, 0.0
    if OWN:
        slope_sum = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        slope_x = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        gain_sum, gain_x, up_sum, up_x, product = slope_x, slope_x, slope_x, slope_x, slope_x
        for first in range(0, size, BLOCK_C):
            k = first + tl.arange(0, BLOCK_C)
            c = (group * size + k)[:, None]
            by = tl.load(slope + sample * C + c, mask=(k < size)[:, None], other=0.0)
            w = (
                tl.load(gain + c, mask=(k < size)[:, None], other=0.0).to(tl.float32)
                if GAIN
                else 1.0
            )
            for begin in range(0, S, BLOCK_P):
                s = (begin + tl.arange(0, BLOCK_P))[None, :]
                inside = (k < size)[:, None] & (s < S)
                h = tl.load(x + c * x_channel + s * x_position, mask=inside, other=0.0)
                d = tl.load(delta + c * d_channel + s * d_position, mask=inside, other=0.0)
                h, d = h.to(tl.float32) - centre, d.to(tl.float32)
                slope_sum += by * d
                slope_x += by * d * h
                if UP:
                    u = tl.load(up + c * u_channel + s * u_position, mask=inside, other=0.0)
                    u = u.to(tl.float32)
                    gain_sum += w * d
                    gain_x += w * d * h
                    up_sum += u
                    up_x += u * h
                    product += w * d * u
        cube = scale * scale * scale * share
        tilt = cube * tl.sum(slope_x)
        if MEAN:
            level = scale * (tl.sum(slope_sum) * share)
        if UP:
            by_up, by_gain = tl.sum(up_x), tl.sum(gain_x)
            up_tilt, of_up = cube * by_up, cube * by_gain
            tilt += cube * (tl.sum(product) - 3 * scale * scale * share * by_gain * by_up)
            if MEAN:
                of_all_up, of_all = tl.sum(up_sum), tl.sum(gain_sum)
                up_level = scale * share * of_all_up
                level -= share * (up_tilt * of_all + of_up * of_all_up)
                tilt -= cube * share * of_all * of_all_up
    for first in range(0, size, BLOCK_C):
        k = first + tl.arange(0, BLOCK_C)
        c = (group * size + k)[:, None]
        by = scale * tl.load(slope + sample * C + c, mask=(k < size)[:, None], other=0.0)
        own = tl.load(shift + sample * C + c, mask=(k < size)[:, None], other=0.0)
        w = 1.0
        if GAIN:
            w = tl.load(gain + c, mask=(k < size)[:, None], other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for begin in range(0, S, BLOCK_P):
            s = (begin + tl.arange(0, BLOCK_P))[None, :]
            inside = (k < size)[:, None] & (s < S)
            h = tl.load(x + c * x_channel + s * x_position, mask=inside, other=0.0)
            d = tl.load(delta + c * d_channel + s * d_position, mask=inside, other=0.0)
            h, d = h.to(tl.float32) - centre, d.to(tl.float32)
            to = c * to_channel + s * to_position
            at_x, at_delta = by * d - level - tilt * h, by * h + own
            if UP:
                u = tl.load(up + c * u_channel + s * u_position, mask=inside, other=0.0)
                u = u.to(tl.float32)
                back = scale * u - up_level - up_tilt * h
                at_x -= of_up * u + up_tilt * w * d
                at_delta += w * back
                total += d * back
            tl.store(of_x + to, at_x, mask=inside)
            tl.store(of_delta + to, at_delta, mask=inside)
        if UP:
            at = of_gain + (sample * T + t) * C + group * size + k
            tl.store(at, tl.sum(total, 1), mask=k < size)


def _tile(channels: int, positions: int, rows: bool) -> dict[str, int]:
    """Long in the direction in which the maps lie."""
    if rows:
        wide = block(channels, 256, 1)
        return {"BLOCK_C": wide, "BLOCK_P": block(positions, TILE // wide, 1)}
    wide = block(positions, 512, 1)
    return {"BLOCK_C": block(channels, TILE // wide, 1), "BLOCK_P": wide}


def _strides(x: Tensor, statistic: Tensor | None) -> tuple[Tensor, int, int, int]:
    """Return a tensor to pass and its strides; for None, a placeholder with strides of 0."""
    return (x, 0, 0, 0) if statistic is None else (statistic, *statistic.stride())


def norm_gradients(
    x: Tensor,
    delta: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    own: bool,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """See `fastdg.ops.norm_gradients`. Accumulates in fp32, in one pass over both maps."""
    weight, bias = _alike([(x, delta, mean, rstd)], eps)
    return weight[0], bias[0]


def _alike(maps: Sequence[_Maps], eps: float | None) -> tuple[Tensor, Tensor]:
    """The gradients ``[K, N, C]`` of K norms whose maps lie alike, in one launch."""
    x, delta, mean, rstd = maps[0]
    K, (N, T, C, S) = len(maps), x.shape
    tile = _tile(C, T * S, S == 1 or by_rows(x, delta))
    blocks, steps = cdiv(C, tile["BLOCK_C"]), max(1, cdiv(T * S, tile["BLOCK_P"]))
    splits = parts(K * N * blocks, steps, K * N * C, x.device)
    chunk = cdiv(steps, splits) * tile["BLOCK_P"]
    weight = x.new_empty((K, N, splits, C), dtype=torch.float32)
    bias = weight.new_empty(weight.shape)
    groups = 1 if rstd is None else rstd.shape[2]
    (m, *m_strides), (r, *r_strides) = _strides(x, mean), _strides(x, rstd)
    launch(
        _norm_sums_kernel, K * N * splits * blocks,
        x, delta, m, r, _table(maps) if K > 1 else x, weight, bias,
        N, T, C, max(1, S), max(1, C // groups), splits, chunk, eps or 0.0,
        *x.stride(), *delta.stride(), *m_strides, *r_strides,
        MANY=K > 1, MEAN=mean is not None, RSTD=rstd is not None, VARIANCE=eps is not None, **tile,
    )  # fmt: skip
    if splits == 1:
        return weight.squeeze(2), bias.squeeze(2)
    return weight.sum(2), bias.sum(2)


def _table(maps: Sequence[_Maps]) -> Tensor:
    """Where the tensors of each norm are, ``[K, 4]``."""
    places = [[0 if t is None else t.data_ptr() for t in tensors] for tensors in maps]
    return integers(places, maps[0][0].device)


def foreach_norm_gradients(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    mean: Sequence[Tensor],
    rstd: Sequence[Tensor],
    eps: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """See `fastdg.ops.foreach_norm_gradients`."""
    alike: dict[object, list[int]] = {}
    maps: list[_Maps] = []
    for k, (h, d, r) in enumerate(zip(x, delta, rstd, strict=True)):
        m = mean[k] if mean else None
        layout = h.shape, h.stride(), d.stride(), r.shape, r.stride(), m is None or m.stride()
        wide = (h.data_ptr() | d.data_ptr()) % 16 == 0
        alone = None if wide else k  # its loads are not those of others
        key = h.dtype, d.dtype, layout, eps[k] if eps else None, alone
        alike.setdefault(key, []).append(k)
        maps.append((h, d, m, r))
    found: list[tuple[Tensor, Tensor]] = [(x[0], x[0])] * len(x)
    for numbers in alike.values():
        sums = _alike([maps[k] for k in numbers], eps[numbers[0]] if eps else None)
        for k, weight, bias in zip(numbers, *(s.unbind() for s in sums), strict=True):
            found[k] = weight, bias
    weights, biases = zip(*found, strict=True)
    return list(weights), list(biases)


def norm_gradients_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    x: Tensor,
    delta: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    own: bool,
    eps: float | None,
    gain: Tensor | None,
    grad_input: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of `norm_gradients` and of the input's gradient; reads each map from
    memory once."""
    N, T, C, S = x.shape
    rows = by_rows(x, delta) and (grad_input is None or by_rows(grad_input))
    of_x, of_delta = gradient_like(x, rows), gradient_like(delta, rows)
    if x.numel() == 0 or grad_input is None:
        of_gain = torch.zeros_like(grad_weight)
        if x.numel() == 0:
            return of_x, of_delta, of_gain
    else:  # of each row: atomic sums would have no fixed order
        of_gain = grad_weight.new_empty((N, T, C))
    groups = 1 if rstd is None else rstd.shape[2]
    (m, *m_strides), (r, *r_strides) = _strides(x, mean), _strides(x, rstd)
    up = x if grad_input is None else grad_input
    launch(
        _norm_gradient_kernel, N * T * groups,
        x, delta, up, m, r, grad_weight.contiguous(), grad_bias.contiguous(),
        x if gain is None else gain.contiguous(), of_x, of_delta, of_gain,
        T, C, S, C // groups, groups / (C * S), eps or 0.0,
        *x.stride(), *delta.stride(), *up.stride(), *m_strides, *r_strides, *of_x.stride(),
        MEAN=mean is not None, RSTD=rstd is not None, VARIANCE=eps is not None, OWN=own,
        UP=grad_input is not None, GAIN=gain is not None,
        **_tile(C // groups, S, S == 1 or rows),
    )  # fmt: skip
    return of_x, of_delta, of_gain if grad_input is None else of_gain.sum(1)


def supports(
    *args: Tensor | Sequence[Tensor] | Sequence[float] | bool | float | None,
) -> str | None:
    """`launch.supports` of each tensor: maps may have two dtypes, and statistics are in fp32."""
    flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return next(filter(None, map(plain, flat)), None)
