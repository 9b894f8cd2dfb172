"""``oracle_nll``: square gaps between feature maps and their slopes, by tiles of channels and
positions."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from ..ops.gradients import by_rows, gradient_like, statistic_dtype
from ..ops.oracle_nll import bias_gradient, values_of, variance_of
from .launch import block, launch, parts
from .launch import supports as plain

TILE = 4096  # elements of a tile


@triton.jit
def _oracle_squares_kernel(
    features, oracle, squares,
    C, P, splits, chunk,
    f_sample, f_channel, f_position, o_sample, o_channel, o_position,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of squares of one sample's block of channels over one chunk of positions."""
    blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    sample = (program // (blocks * splits)).to(tl.int64)
    split = program // blocks % splits
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    f = features + sample * f_sample + c.to(tl.int64)[:, None] * f_channel
    o = oracle + sample * o_sample + c.to(tl.int64)[:, None] * o_channel
    first = split * chunk
    last = tl.minimum(P, first + chunk)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for begin in range(first, last, BLOCK_P):
        p = (begin + tl.arange(0, BLOCK_P))[None, :]
        inside = (c < C)[:, None] & (p < last)
        x = tl.load(f + p * f_position, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(o + p * o_position, mask=inside, other=0.0).to(tl.float32)
        total += (x - y) * (x - y)
    tl.store(squares + (sample * splits + split) * C + c, tl.sum(total, 1), mask=c < C)


@triton.jit
def _oracle_slopes_kernel(
    features, oracle, grad, variance, out,
    C, P, share,
    f_sample, f_channel, f_position, o_sample, o_channel, o_position,
    to_sample, to_channel, to_position,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gap times the slope of its channel, one tile of one sample."""
    c_blocks, p_blocks = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    program = tl.program_id(0)
    sample = (program // (c_blocks * p_blocks)).to(tl.int64)
    c = (program // p_blocks % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = (program % p_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    s = tl.load(variance + c, mask=c < C, other=1.0).to(tl.float32)
    slope = (tl.load(grad + sample).to(tl.float32) * share / s)[:, None]
    inside = (c < C)[:, None] & (p < P)[None, :]
    c, p = c.to(tl.int64)[:, None], p.to(tl.int64)[None, :]
    f = features + sample * f_sample + c * f_channel + p * f_position
    o = oracle + sample * o_sample + c * o_channel + p * o_position
    x = tl.load(f, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(o, mask=inside, other=0.0).to(tl.float32)
    to = out + sample * to_sample + c * to_channel + p * to_position
    tl.store(to, (x - y) * slope, mask=inside)


def _tile(features: Tensor) -> dict[str, int]:
    """Long in the direction in which the features lie."""
    _, C, P = features.shape
    if by_rows(features):
        channels = block(C, 256)
        return {"BLOCK_C": channels, "BLOCK_P": block(P, TILE // channels)}
    positions = block(P, 1024)
    return {"BLOCK_C": block(C, TILE // positions, 1), "BLOCK_P": positions}


def oracle_nll(features: Tensor, oracle: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastdg.ops.oracle_nll`. Accumulates in fp32, in one pass over both maps."""
    N, C, P = features.shape
    tile = _tile(features)
    blocks, steps = cdiv(C, tile["BLOCK_C"]), max(1, cdiv(P, tile["BLOCK_P"]))
    splits = parts(N * blocks, steps, N * C, features.device)
    chunk = cdiv(steps, splits) * tile["BLOCK_P"]
    squares = features.new_empty((N, splits, C), dtype=statistic_dtype(features.dtype))
    launch(
        _oracle_squares_kernel, N * splits * blocks,
        features, oracle, squares,
        C, P, splits, chunk, *features.stride(), *oracle.stride(), **tile,
    )  # fmt: skip
    total = squares.squeeze(1) if splits == 1 else squares.sum(1)
    return values_of(total, bias.to(total.dtype), P), total


def oracle_nll_backward(
    grad: Tensor, features: Tensor, oracle: Tensor, bias: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `oracle_nll`: one read of both maps, one write."""
    N, C, P = features.shape
    tile, out = _tile(features), gradient_like(features, by_rows(features))
    launch(
        _oracle_slopes_kernel, N * cdiv(C, tile["BLOCK_C"]) * cdiv(P, tile["BLOCK_P"]),
        features, oracle, grad.contiguous(), variance_of(bias.to(squares.dtype)), out,
        C, P, 1 / max(1, C * P), *features.stride(), *oracle.stride(), *out.stride(), **tile,
    )  # fmt: skip
    return out, bias_gradient(grad, bias, squares, P)


def supports(*args: Tensor) -> str | None:
    """`launch.supports` of each tensor: an oracle may be in half precision."""
    return next(filter(None, map(plain, args)), None)
