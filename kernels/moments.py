"""``moments``: mean and biased variance of given per-sample gradients, by domain."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block, gradient_like, launch
from .launch import supports as plain


@triton.jit
def _moments_kernel(
    grads, order, offsets, mean, variance, P, sample_stride, column_stride,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One domain and BLOCK_P columns, in one pass.

    Sums of squares around the mean of BLOCK_N samples are merged as Chan, Golub and LeVeque do:
    nothing cancels, nothing gets negative.
    """
    blocks = tl.cdiv(P, BLOCK_P)
    domain = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = grads + p.to(tl.int64) * column_stride
    begin = tl.load(offsets + domain)
    end = tl.load(offsets + domain + 1)
    total = tl.zeros((BLOCK_P,), tl.float32)
    square = tl.zeros((BLOCK_P,), tl.float32)
    seen = 0.0
    for first in range(begin, end, BLOCK_N):
        rank = first + tl.arange(0, BLOCK_N)
        sample = tl.load(order + rank, mask=rank < end, other=0)
        inside = (rank < end)[:, None] & (p < P)[None, :]
        g = tl.load(columns[None, :] + (sample * sample_stride)[:, None], mask=inside, other=0.0)
        g = g.to(tl.float32)
        count = tl.minimum(end - first, BLOCK_N).to(tl.float32)
        part = tl.sum(g, 0)
        centred = tl.where(inside, g - (part / count)[None, :], 0.0)
        square += tl.sum(centred * centred, 0)
        if seen > 0:
            apart = part / count - total / seen
            square += apart * apart * (seen * count / (seen + count))
        total += part
        seen += count
    count = tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(mean + domain * P + p, total / count, mask=p < P)
    tl.store(variance + domain * P + p, square / count, mask=p < P)


@triton.jit
def _moments_backward_kernel(
    grad_mean, grad_variance, grads, mean, order, offsets, out, P, sample_stride, column_stride,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``(2 (g - mean) grad_variance + grad_mean) / n`` for one domain and BLOCK_P columns."""
    blocks = tl.cdiv(P, BLOCK_P)
    domain = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    begin = tl.load(offsets + domain)
    end = tl.load(offsets + domain + 1)
    count = tl.maximum(end - begin, 1).to(tl.float32)
    at = domain * P + p
    slope = tl.load(grad_variance + at, mask=p < P, other=0.0).to(tl.float32) * (2.0 / count)
    level = tl.load(grad_mean + at, mask=p < P, other=0.0).to(tl.float32) / count
    centre = tl.load(mean + at, mask=p < P, other=0.0).to(tl.float32)
    columns = p.to(tl.int64) * column_stride
    for first in range(begin, end, BLOCK_N):
        rank = first + tl.arange(0, BLOCK_N)
        sample = tl.load(order + rank, mask=rank < end, other=0)[:, None]
        inside = (rank < end)[:, None] & (p < P)[None, :]
        g = tl.load(grads + columns[None, :] + sample * sample_stride, mask=inside, other=0.0)
        value = (g.to(tl.float32) - centre[None, :]) * slope[None, :] + level[None, :]
        tl.store(out + sample * P + p[None, :], value, mask=inside)


def _columns(P: int, domains: int) -> int:
    """Columns of a program: enough for wide loads, few enough to make many programs."""
    return block(P, 512 if P * domains >= 1 << 18 else 128)


def moments(grads: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastdg.ops.moments`. Accumulates in fp32, in one pass over ``grads``."""
    P, domains = grads.shape[1], offsets.numel() - 1
    mean = grads.new_empty((domains, P), dtype=torch.float32)
    variance = torch.empty_like(mean)
    columns = _columns(P, domains)
    launch(
        _moments_kernel, domains * triton.cdiv(P, columns),
        grads, order, offsets, mean, variance, P, *grads.stride(),
        BLOCK_N=8, BLOCK_P=columns,
    )  # fmt: skip
    return mean, variance


def moments_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    grads: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Return the gradient of `moments`, one read and one write of ``grads``."""
    P, domains = grads.shape[1], offsets.numel() - 1
    out = gradient_like(grads, order)
    columns = _columns(P, domains)
    launch(
        _moments_backward_kernel, domains * triton.cdiv(P, columns),
        grad_mean.contiguous(), grad_variance.contiguous(), grads, mean.contiguous(),
        order, offsets, out, P, *grads.stride(),
        BLOCK_N=8, BLOCK_P=columns,
    )  # fmt: skip
    return out


def supports(*args: Tensor) -> str | None:
    """`launch.supports` of each tensor: statistics are in fp32, gradients may be halves."""
    return next(filter(None, map(plain, args)), None)
