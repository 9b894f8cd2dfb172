"""``attention_maps``: a row of all maps at a time."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block, launch
from .launch import supports as plain

LONGEST = 4096  # of a row, whose four operands and their products are in registers


@triton.jit
def _attention_maps_kernel(
    scores, of_weights, up, direct, weights, of_scores, of_up, to, S, BLOCK: tl.constexpr
):  # fmt: skip
    """See `fastdg.ops.second.attention_maps`."""
    k = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * S + k
    inside = k < S
    z = tl.load(scores + at, mask=inside, other=-float("inf")).to(tl.float32)
    highest = tl.max(z, 0)
    p = tl.exp(z - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(p, 0)
    p /= tl.where(total == 0, 1.0, total)  # 0: the query sees no key
    a = tl.load(of_weights + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    a_centred, u_level = a - tl.sum(p * a, 0), tl.sum(p * u, 0)
    w = tl.load(direct + at, mask=inside, other=0.0).to(tl.float32)
    w += u * a_centred - u_level * a
    tl.store(weights + at, p, mask=inside)
    tl.store(of_scores + at, p * a_centred, mask=inside)
    tl.store(of_up + at, p * (u - u_level), mask=inside)
    tl.store(to + at, p * (w - tl.sum(p * w, 0)), mask=inside)


def attention_maps(
    scores: Tensor, of_weights: Tensor, up: Tensor, direct: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastdg.ops.second.attention_maps`: one read and one write of each map."""
    B, T, S = scores.shape
    one, two, three, four = (scores.new_empty(scores.shape, dtype=dtype) for _ in range(4))
    operands = (x.contiguous() for x in (scores, of_weights, up, direct))
    width = block(S, LONGEST)
    launch(
        _attention_maps_kernel, B * T if S else 0, *operands, one, two, three, four, S,
        BLOCK=width, num_warps=4 if width <= 1024 else 8,
    )  # fmt: skip
    return one, two, three, four


def supports(*args: Any) -> str | None:
    """`launch.supports` of each tensor, with rows that fit."""
    if args[0].shape[2] > LONGEST:
        return f"rows are longer than {LONGEST}"
    return plain(*(x for x in args if isinstance(x, Tensor)))
