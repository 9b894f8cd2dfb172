"""``activation_derivative``: one pass over the maps as they lie."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from ..ops.second.activation_derivative import CUBE, RATE
from .launch import launch
from .launch import supports as plain

BLOCK = 1024
HALF_ROOT = tl.constexpr(sqrt(0.5))
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
RATES, CUBES = tl.constexpr(RATE), tl.constexpr(CUBE)


@triton.jit
def _activation_kernel(x, delta, up, of_x, of_delta, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Kinds are places in `KINDS`: GELU, its approximation, SiLU."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == 0:
        density = tl.exp(h * h * -0.5) * DENSITY
        one = 0.5 * (1.0 + tl.erf(h * HALF_ROOT)) + h * density
        two = density * (2.0 - h * h)
    else:
        w, w1, w2 = h, 1.0, 0.0
        if KIND == 1:
            w = RATES * h * (1.0 + CUBES * h * h)
            w1 = RATES * (1.0 + 3.0 * CUBES * h * h)
            w2 = 6.0 * RATES * CUBES * h
        power = tl.exp(-tl.abs(w))  # never overflows
        whole = 1.0 / (1.0 + power)
        part = power * whole
        slope = part * whole
        tilt = tl.where(w < 0, whole - part, part - whole)
        one = tl.where(w < 0, part, whole) + h * slope * w1
        two = slope * (2.0 * w1 + h * (tilt * w1 * w1 + w2))
    tl.store(of_x + at, u * d * two, mask=inside)
    tl.store(of_delta + at, u * one, mask=inside)


def activation_derivative(x: Tensor, delta: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """See `fastdg.ops.second.activation_derivative`. Computes in fp32, in one read of each map."""
    x, delta, up = x.contiguous(), delta.contiguous(), up.contiguous()
    of_x, of_delta = torch.empty_like(x), torch.empty_like(delta)
    launch(
        _activation_kernel, cdiv(x.numel(), BLOCK),
        x, delta, up, of_x, of_delta, x.numel(), KIND=kind, BLOCK=BLOCK,
    )  # fmt: skip
    return of_x, of_delta


def supports(*args: Any) -> str | None:
    """`launch.supports` of each tensor: maps may have several dtypes."""
    return next(filter(None, (plain(x) for x in args if isinstance(x, Tensor))), None)
