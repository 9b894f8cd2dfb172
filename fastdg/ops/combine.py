"""``combine``: a weighted sum of the domains' gradients, for all parameters at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import flatten, in_dtype_of, of_parameter, statistic_dtype


def weighted_sum(gradients: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return ``sum_d w_d g_d`` of one parameter in the dtype of the weights, contiguous."""
    total = gradients[0].new_zeros(gradients[0].shape, dtype=weights.dtype)
    for gradient, weight in zip(gradients, weights, strict=True):
        total += gradient * weight
    return total


def reference(gradients: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    domains, dtype = len(weights), gradients[0].dtype
    weights = weights.to(statistic_dtype(dtype))
    return [
        weighted_sum(of_parameter(gradients, domains, k), weights).to(dtype)
        for k in range(len(gradients) // domains)
    ]


def _fake(gradients: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return [g.new_empty(g.shape) for g in gradients[: len(gradients) // weights.shape[0]]]


def check(gradients: Sequence[Tensor], weights: Tensor) -> None:
    checks.weighted(gradients, weights)


define(
    "combine(Tensor[] gradients, Tensor weights) -> Tensor[]", reference, _fake, check, mixed=True
)
not_differentiable("combine", "Add the gradients with PyTorch's own functions instead.")


def combine(gradients: Sequence[Sequence[Tensor]], weights: Tensor) -> list[Tensor]:
    r"""Weighted sum of the domains' gradients, parameter by parameter.

    .. math:: g_k = \sum_d w_d\, g_{dk}

    Args:
        gradients: a list of tensors for each domain, ``gradients[d][k]`` of parameter k; every
            domain has the same shapes. Views are fine.
        weights: ``[D]``, floating point, on the device of the gradients; taken in their dtype. A
            weight of 0 is a factor like any other: NaN and inf come through.

    Returns:
        One contiguous tensor for each parameter, in the gradients' dtype. Not differentiable.

    Raises:
        TypeError, ValueError: there is no gradient, the domains differ in shapes, dtype or device,
            the weights have another shape or device, or something is not a dense floating-point
            tensor.
    """
    flat = flatten(gradients)
    checks.one_each("weights", weights, len(gradients))
    return call("combine", flat, in_dtype_of(flat[0], weights))
