"""``foreach_moments``: moments by domain of many small parameters' gradients in one launch."""

# ruff: noqa: E741  (O and I are shapes)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import integers, launch
from .launch import supports as plain

FIELDS = tl.constexpr(13)  # of each tensor in the table
BLOCK_O, BLOCK_I = 16, 64


@triton.jit
def _foreach_moments_kernel(
    like, table, tiles, order, offsets, count,
    VARIANCE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_O, BLOCK_I] of one domain of one of the tensors.

    Sums are taken around the first sample's gradient, so that the variance does not cancel where
    the samples agree.
    """
    domain = (tl.program_id(0) // count).to(tl.int64)
    pair = tiles + tl.program_id(0) % count * 2
    of = table + tl.load(pair) * FIELDS
    tile = tl.load(pair + 1)
    kind = tl.pointer_type(like.dtype.element_ty)
    a = tl.load(of).to(kind)
    delta = tl.load(of + 1).to(kind)
    mean = tl.load(of + 2).to(tl.pointer_type(tl.float32))
    variance = tl.load(of + 3).to(tl.pointer_type(tl.float32))
    T = tl.load(of + 4)
    O = tl.load(of + 5)
    I = tl.load(of + 6)
    tiles_i = tl.cdiv(I, BLOCK_I)
    o = tile // tiles_i * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    a_at = a + i * tl.load(of + 9)
    d_at = delta + o * tl.load(of + 12)
    begin = tl.load(offsets + domain)
    end = tl.load(offsets + domain + 1)
    shift = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    second = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for n in range(begin, end):
        sample = tl.load(order + n)
        g = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for t in range(T):
            x = tl.load(
                a_at + (sample * tl.load(of + 7) + t * tl.load(of + 8)), mask=i < I, other=0.0
            )
            d = tl.load(
                d_at + (sample * tl.load(of + 10) + t * tl.load(of + 11)), mask=o < O, other=0.0
            )
            g += d.to(tl.float32)[:, None] * x.to(tl.float32)[None, :]
        if n == begin:
            shift = g
        total += g - shift
        second += (g - shift) * (g - shift)
    samples = tl.maximum(end - begin, 1).to(tl.float32)
    total = total / samples
    inside = (o < O)[:, None] & (i < I)[None, :]
    at = domain * O * I + o[:, None] * I + i[None, :]
    tl.store(mean + at, total + shift, mask=inside)
    if VARIANCE:
        spread = tl.maximum(
            second / samples - total * total, 0.0, propagate_nan=tl.PropagateNan.ALL
        )
        tl.store(variance + at, spread, mask=inside)


def foreach_moments(
    order: Tensor,
    offsets: Tensor,
    grads: Sequence[Tensor],
    a: Sequence[Tensor],
    delta: Sequence[Tensor],
    variance: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """See `fastdg.ops.foreach_moments`."""
    like = grads[0] if grads else a[0]
    N, D = like.shape[0], offsets.numel() - 1
    one = like.new_ones(1)  # a gradient is an outer product with it
    pairs = [(g.reshape(N, 1, g.shape[1:].numel()), one.expand(N, 1, 1)) for g in grads]
    pairs += [
        (x, d) if x.dim() == 3 else (x.unsqueeze(1), d.unsqueeze(1))
        for x, d in zip(a, delta, strict=True)
    ]
    shapes = [(D, *g.shape[1:]) for g in grads]
    shapes += [(D, d.shape[-1], x.shape[-1]) for x, d in zip(a, delta, strict=True)]
    means = [like.new_empty(shape, dtype=torch.float32) for shape in shapes]
    variances = [torch.empty_like(mean) for mean in means] if variance else []
    operands: list[int] = []
    tiles: list[int] = []
    for k, ((x, d), mean) in enumerate(zip(pairs, means, strict=True)):
        _, T, I = x.shape
        O = d.shape[2]
        spread = variances[k] if variance else mean
        operands += [x.data_ptr(), d.data_ptr(), mean.data_ptr(), spread.data_ptr()]
        operands += [T, O, I, *x.stride(), *d.stride()]
        for tile in range(triton.cdiv(O, BLOCK_O) * triton.cdiv(I, BLOCK_I)):
            tiles += [k, tile]
    numbers = integers(tiles + operands, like.device)
    launch(
        _foreach_moments_kernel, D * (len(tiles) // 2),
        like, numbers[len(tiles) :], numbers, order, offsets, max(1, len(tiles) // 2),
        VARIANCE=variance, BLOCK_O=BLOCK_O, BLOCK_I=BLOCK_I,
    )  # fmt: skip
    return means, variances


def supports(
    order: Tensor,
    offsets: Tensor,
    grads: Sequence[Tensor],
    a: Sequence[Tensor],
    delta: Sequence[Tensor],
    variance: bool,
) -> str | None:
    """`launch.supports` of all tensors."""
    return plain(order, offsets, *grads, *a, *delta)
