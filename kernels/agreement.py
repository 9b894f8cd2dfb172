"""``agreement``: the domains' gradients of many parameters, combined where their signs agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.agreement import UNDEFINED as _UNDEFINED
from .launch import integers, launch
from .launch import supports as plain

UNDEFINED = tl.constexpr(_UNDEFINED)
FIELDS = tl.constexpr(2)  # of each parameter in the table, before the places of its gradients
BLOCK = 1024


@triton.jit
def count_domain(g, weight, count, balance, total, mean, second, SOFT: tl.constexpr):
    """One more domain present: signs, weighted sum and, for the soft mask, Welford's moments."""
    sign = (g > 0).to(tl.float32) - (g < 0).to(tl.float32)
    balance += tl.where(g == g, sign, g)  # NaN stays
    total += weight * g
    count += 1.0
    if SOFT:
        change = g - mean
        mean += change / count
        second += change * (g - mean)
    return count, balance, total, mean, second


@triton.jit
def _tanh(x):
    """tanh for x >= 0, and NaN; the exponentials would cancel where x is small."""
    square = x * x
    series = x * (1 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315))))
    decay = tl.exp(-2 * x)
    return tl.where(x < 0.2, series, (1 - decay) / (1 + decay))


@triton.jit
def store_agreed(
    combined, agreeing, magnitude, at, inside, count, balance, total, second, threshold, steepness,
    SOFT: tl.constexpr,
):  # fmt: skip
    """The mask and the combination of one tile, and its part of both sums."""
    common = tl.abs(tl.div_rn(balance, count))  # 3 of 5 is 0.6, exactly as rounded
    if SOFT:
        spread = second / (count - 1)
        variance = tl.where(spread == spread, spread, UNDEFINED)
        slope = steepness / variance * (common - threshold)
        mask = _tanh(tl.maximum(slope, 0.0, propagate_nan=tl.PropagateNan.ALL))
        mask = tl.where(mask == mask, mask, UNDEFINED)
    else:
        mask = (common >= threshold).to(tl.float32)
    mask = tl.where(inside, tl.where(count > 0, mask, 0.0), 0.0)
    result = tl.where(inside, mask * total, 0.0)  # beyond the edge 0 * inf may have come in
    tl.store(combined + at, result, mask=inside)
    tl.store(agreeing + tl.program_id(0), tl.sum(mask))
    tl.store(magnitude + tl.program_id(0), tl.sum(tl.abs(result)))


@triton.jit(do_not_specialize=["parameters", "programs"])
def _agreement_kernel(
    like, table, starts, weights, partial, threshold, steepness, domains, parameters, programs,
    SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one parameter: the last whose first program is not after this one."""
    program = tl.program_id(0)
    parameter = 0
    end = parameters
    while end - parameter > 1:
        middle = (parameter + end) // 2
        if tl.load(starts + middle) <= program:
            parameter = middle
        else:
            end = middle
    kind = tl.pointer_type(like.dtype.element_ty)
    place = table + parameter * (domains + FIELDS)
    size = tl.load(place)
    combined = tl.load(place + 1).to(kind)
    at = (program - tl.load(starts + parameter)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    count = 0.0
    balance = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for domain in range(domains):
        weight = tl.load(weights + domain).to(tl.float32)
        if weight != 0:
            gradient = tl.load(place + FIELDS + domain).to(kind)
            g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
            count, balance, total, mean, second = count_domain(
                g, weight, count, balance, total, mean, second, SOFT
            )
    store_agreed(
        combined, partial, partial + programs, at, inside,
        count, balance, total, second, threshold, steepness, SOFT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["parameters", "programs"])
def _totals_kernel(partial, starts, out, parameters, programs, BLOCK: tl.constexpr):
    """The sum of all blocks of one parameter, of one of the two."""
    parameter = tl.program_id(0) % parameters
    partial += tl.program_id(0) // parameters * programs
    first = tl.load(starts + parameter)
    last = tl.load(starts + parameter + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(first, last, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < last, other=0.0).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(total).to(tl.float32))


def agreement(
    gradients: Sequence[Tensor], weights: Tensor, threshold: float, steepness: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """See `fastdg.ops.agreement`."""
    domains, soft = weights.numel(), not math.isinf(steepness)
    parameters = len(gradients) // domains
    gradients = [g.contiguous() for g in gradients]
    combined = [g.new_empty(g.shape) for g in gradients[:parameters]]
    starts, operands = [0], []
    for k, result in enumerate(combined):
        starts.append(starts[-1] + triton.cdiv(result.numel(), BLOCK))
        operands += [result.numel(), result.data_ptr()]
        operands += [g.data_ptr() for g in gradients[k::parameters]]
    programs, like = starts[-1], gradients[0]
    numbers = integers(starts + operands, like.device)
    partial = like.new_empty((2, programs), dtype=torch.float32)
    launch(
        _agreement_kernel, programs,
        like, numbers[len(starts) :], numbers, weights.contiguous(), partial,
        threshold, steepness if soft else 0.0, domains, parameters, programs,
        SOFT=soft, BLOCK=BLOCK,
    )  # fmt: skip
    sums = like.new_empty((2, parameters), dtype=torch.float32)
    launch(
        _totals_kernel, 2 * parameters, partial, numbers, sums, parameters, programs, BLOCK=BLOCK
    )
    agreeing, magnitude = sums.unbind()
    return combined, agreeing, magnitude


def supports(
    gradients: Sequence[Tensor], weights: Tensor, threshold: float, steepness: float
) -> str | None:
    """`launch.supports` of the gradients, and of the weights, which may have another dtype."""
    return plain(*gradients) or plain(weights)
