"""``agreement``: the domains' gradients combined where their signs agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .combine import weighted_sum
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import flatten, in_dtype_of, of_parameter, statistic_dtype

UNDEFINED = 1e-17  # DomainBed's value for a variance or a mask that is not a number


def mask(
    gradients: Sequence[Tensor], weights: Tensor, threshold: float, steepness: float
) -> Tensor:
    """How far the domains present agree at each place of one parameter, in ``weights.dtype``."""
    here = (weights != 0).view(-1, *([1] * gradients[0].dim()))
    count = here.sum().to(weights.dtype)
    g = torch.stack(list(gradients)).to(weights.dtype)
    signs = torch.where(g.isnan(), g, g.sign())
    common = (signs.where(here, 0).sum(0) / count).abs()
    if math.isinf(steepness):
        return (common >= threshold).to(weights.dtype)
    mean = g.where(here, 0).sum(0) / count
    spread = (g - mean).square().where(here, 0).sum(0) / (count - 1)
    variance = spread.where(~spread.isnan(), UNDEFINED)
    soft = torch.tanh(steepness / variance * (common - threshold)).clamp(min=0)
    return soft.where(~soft.isnan(), UNDEFINED)


def masked(
    gradients: Sequence[Tensor], weights: Tensor, threshold: float, steepness: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``agreement`` of one parameter: the combination, and both sums in float64."""
    present = weights != 0
    kept = [g.where(here, 0) for g, here in zip(gradients, present, strict=True)]
    m = mask(gradients, weights, threshold, steepness).where(present.any(), 0)
    combined = m * weighted_sum(kept, weights)
    return combined, m.double().sum(), combined.double().abs().sum()


def reference(
    gradients: Sequence[Tensor], weights: Tensor, threshold: float, steepness: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    domains, dtype = len(weights), gradients[0].dtype
    sums = statistic_dtype(dtype)
    parts = [
        masked(of_parameter(gradients, domains, k), weights.to(sums), threshold, steepness)
        for k in range(len(gradients) // domains)
    ]
    return (
        [combined.to(dtype) for combined, _, _ in parts],
        torch.stack([agreeing for _, agreeing, _ in parts]).to(sums),
        torch.stack([magnitude for _, _, magnitude in parts]).to(sums),
    )


def _fake(
    gradients: Sequence[Tensor], weights: Tensor, threshold: float, steepness: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    first = gradients[: len(gradients) // weights.shape[0]]
    sums = first[0].new_empty((len(first),), dtype=statistic_dtype(first[0].dtype))
    return [g.new_empty(g.shape) for g in first], sums, torch.empty_like(sums)


def check(gradients: Sequence[Tensor], weights: Tensor, threshold: float, steepness: float) -> None:
    checks.weighted(gradients, weights)
    checks.mask(threshold, steepness)


define(
    "agreement(Tensor[] gradients, Tensor weights, float threshold, float steepness) "
    "-> (Tensor[], Tensor, Tensor)",
    reference,
    _fake,
    check,
    mixed=True,
)
not_differentiable("agreement", "Its mask is constant almost everywhere.")


def agreement(
    gradients: Sequence[Sequence[Tensor]],
    weights: Tensor,
    threshold: float = 1.0,
    steepness: float = math.inf,
) -> tuple[list[Tensor], Tensor, Tensor]:
    r"""Weighted sum of the domains' gradients where their signs agree.

    With E domains present, s the mean of the signs over them and v the unbiased variance,

    .. math:: g_k = m_k \sum_d w_d\, g_{dk}, \qquad m = \begin{cases}
              1[|s| \ge \tau] & \kappa = \infty \\
              \max(0, \tanh(\kappa / v \cdot (|s| - \tau))) & \text{else.}\end{cases}

    A domain whose weight is 0 is absent: whatever stands in its gradients takes part in nothing.
    The sign of 0 is 0. Where a variance or a mask is not a number it is 1e-17, as in DomainBed: so
    with one domain present (no variance) and :math:`\tau < 1` the soft mask is the hard one. The
    mask is a factor: NaN and inf come through.

    Args:
        gradients: a list of tensors for each domain, ``gradients[d][k]`` of parameter k; every
            domain has the same shapes. Views are fine.
        weights: ``[D]``, floating point, on the device of the gradients; taken in their dtype.
        threshold: the common sign :math:`\tau`, from 0 to 1; 1 asks for all the domains.
        steepness: :math:`\kappa` of the soft mask of SAND; ``inf`` for the hard one.

    Returns:
        ``(combined, agreeing, magnitude)``: one contiguous tensor for each parameter in the
        gradients' dtype; the sum of the mask over each parameter ``[P]``; and the sum of
        ``combined.abs()`` over each ``[P]``. Both are summed in float64 and come in float32, or in
        float64 for gradients in float64. Zeros where all domains are absent. Not differentiable.

    Raises:
        TypeError, ValueError: there is no gradient, the domains differ in shapes, dtype or device,
            the weights have another shape or device, ``threshold`` is not finite, ``steepness`` not
            positive, or something is not a dense floating-point tensor.

    Papers: Mansilla et al., "Domain generalization via gradient surgery" (ICCV 2021);
    Parascandolo et al., "Learning explanations that are hard to vary" (ICLR 2021); Shahtalebi et
    al., "SAND-mask" (2021).
    """
    flat = flatten(gradients)
    checks.one_each("weights", weights, len(gradients))
    weights = in_dtype_of(flat[0], weights)
    combined, agreeing, magnitude = call("agreement", flat, weights, threshold, steepness)
    return combined, agreeing, magnitude
