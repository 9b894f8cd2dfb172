"""``outer_agreement``: the domains' mean gradients combined where their signs agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import to_statistics_dtype
from . import checks
from .agreement import masked
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import in_dtype_of, statistic_dtype
from .outer_moments import check_values, domain_rows
from .window import sizes, unfold


def reference(
    a: Tensor,
    delta: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    threshold: float,
    steepness: float,
    window: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, outputs, domains = sizes(a.shape, window)[1], delta.shape[2], offsets.numel() - 1
    a, delta = to_statistics_dtype(a), to_statistics_dtype(delta)
    combined = a.new_empty((outputs, inputs))
    agreeing, magnitude = (a.new_zeros((), dtype=torch.float64) for _ in "am")
    height = max(1, -(-outputs // max(1, domains)))
    block = a.new_empty((domains, height, inputs))  # about one weight, not one for each domain
    for first in range(0, outputs, height):
        mean = block[:, : min(height, outputs - first)].zero_()
        for domain, rows in domain_rows(order, offsets):
            d = delta[rows, :, first : first + height].flatten(0, 1)
            torch.mm(d.t(), unfold(a[rows], window).flatten(0, 1), out=mean[domain])
            mean[domain] /= rows.numel()
        part, agree, size = masked(list(mean), weights.to(a.dtype), threshold, steepness)
        combined[first : first + height] = part
        agreeing += agree
        magnitude += size
    return combined, agreeing.to(a.dtype), magnitude.to(a.dtype)


def _fake(
    a: Tensor,
    delta: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    threshold: float,
    steepness: float,
    window: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    sums = statistic_dtype(a.dtype)
    combined = a.new_empty((delta.shape[2], sizes(a.shape, window)[1]), dtype=sums)
    return combined, a.new_empty((), dtype=sums), a.new_empty((), dtype=sums)


def check(
    a: Tensor,
    delta: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    threshold: float,
    steepness: float,
    window: Sequence[int],
) -> None:
    checks.outer(a, delta, window)
    checks.one_each("weights", weights, checks.partition(order, offsets, a, "a"))
    checks.on_device("weights", weights, a, "a")
    checks.mask(threshold, steepness)


define(
    "outer_agreement(Tensor a, Tensor delta, Tensor order, Tensor offsets, Tensor weights, "
    "float threshold, float steepness, int[] window) -> (Tensor, Tensor, Tensor)",
    reference,
    _fake,
    check,
    check_values,
    mixed=True,
    halves=(),
)
not_differentiable("outer_agreement", "Its mask is constant almost everywhere.")


def outer_agreement(
    a: Tensor,
    delta: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    threshold: float = 1.0,
    steepness: float = math.inf,
    window: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Weighted sum of the domains' mean gradients where their signs agree.

    The same as `agreement` of the :math:`G_d` of `outer_domain`, but in the memory of about one
    weight: they never exist all at once.

    Args:
        a: layer inputs as in `outer_domain`.
        delta: gradients at the layer's outputs ``[N, T, O]``, as in `outer_domain`.
        order, offsets: a partition of the samples by domain, as in `moments`.
        weights: ``[D]``, floating point, on the device of ``a``; 0 for a domain that takes no part,
            as an empty one has to be.
        threshold: as in `agreement`.
        steepness: as in `agreement`.
        window: as in `outer_domain`.

    Returns:
        ``(combined, agreeing, magnitude)``: ``[O, I]``, and 0-dim the sums of the mask and of
        ``combined.abs()``; in float32, or in float64 for factors in float64. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, ``threshold`` is not
            finite, ``steepness`` not positive, ``window`` does not fit ``a``, or ``order`` and
            ``offsets`` are no partition.
    """
    weights = in_dtype_of(a, weights)
    args = (a, delta, order, offsets, weights, threshold, steepness, list(window))
    return call("outer_agreement", *args)
