"""``moments``: mean and biased variance of given per-sample gradients, by domain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import to_statistics_dtype
from . import checks
from .dispatch.derivatives import call, differentiable, not_differentiable
from .dispatch.registry import define
from .gradients import statistic_dtype


def reference(grads: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    domain, rows = domain_of(order, offsets), to_statistics_dtype(grads[order])
    count = (offsets[1:] - offsets[:-1]).clamp(min=1).to(rows.dtype).unsqueeze(1)
    zero = rows.new_zeros((offsets.numel() - 1, grads.shape[1]))
    mean = zero.index_add(0, domain, rows) / count
    centred = rows - mean[domain]  # two passes: never negative, and exact where one pass cancels
    return mean, zero.index_add(0, domain, centred * centred) / count


def domain_of(order: Tensor, offsets: Tensor) -> Tensor:
    """Domain of each entry of ``order``, without leaving the device."""
    rank = torch.arange(order.numel(), device=order.device)
    return torch.searchsorted(offsets[1:].contiguous(), rank, right=True)


def check(grads: Tensor, order: Tensor, offsets: Tensor) -> Any:
    checks.floating("grads", grads)
    checks.dims("grads", grads, "[N, P]", 2)
    return checks.partition(order, offsets, grads, "grads")


def check_values(grads: Tensor, order: Tensor, offsets: Tensor) -> None:
    checks.partition_values(order, offsets, grads.shape[0])


def check_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    grads: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> None:
    D = check(grads, order, offsets)
    for name, x in (("grad_mean", grad_mean), ("grad_variance", grad_variance), ("mean", mean)):
        checks.statistic(name, x, statistic_dtype(grads.dtype), grads, "grads")
        checks.shape(name, x, (D, grads.shape[1]), "D, P")


def check_values_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    grads: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> None:
    check_values(grads, order, offsets)


def _fake(grads: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    shape = (offsets.shape[0] - 1, grads.shape[1])
    mean = grads.new_empty(shape, dtype=statistic_dtype(grads.dtype))
    return mean, torch.empty_like(mean)


def reference_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    grads: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> Tensor:
    domain = domain_of(order, offsets)
    count = (offsets[1:] - offsets[:-1]).clamp(min=1).to(mean.dtype).unsqueeze(1)
    centred = grads[order] - mean[domain]
    rows = (2 * centred * grad_variance[domain] + grad_mean[domain]) / count[domain]
    return grads.new_zeros(grads.shape).index_copy_(0, order, rows.to(grads.dtype))


def _fake_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    grads: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> Tensor:
    return torch.empty_like(grads, memory_format=torch.contiguous_format)


define(
    "moments(Tensor grads, Tensor order, Tensor offsets) -> (Tensor, Tensor)",
    reference,
    _fake,
    check,
    check_values,
    halves=(),
)
define(
    "moments_backward(Tensor grad_mean, Tensor grad_variance, Tensor grads, Tensor mean, "
    "Tensor order, Tensor offsets) -> Tensor",
    reference_backward,
    _fake_backward,
    check_backward,
    check_values_backward,
    mixed=True,
    halves=(2,),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grads, order, offsets = inputs
    ctx.save_for_backward(grads, output[0], order, offsets)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_mean: Tensor | None, grad_variance: Tensor | None
) -> tuple[Tensor, None, None]:
    grads, mean, order, offsets = ctx.saved_tensors
    zero = mean.new_zeros(()).expand_as(mean)
    grad_mean = zero if grad_mean is None else grad_mean
    grad_variance = zero if grad_variance is None else grad_variance
    return (
        call("moments_backward", grad_mean, grad_variance, grads, mean, order, offsets),
        None,
        None,
    )


differentiable("moments", _setup, _backward)
not_differentiable(
    "moments_backward", "moments is differentiable once. Use its result in one backward."
)


def moments(grads: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and biased variance of per-sample gradients, by domain.

    .. math:: m_d = \frac1{n_d} \sum_{i \in d} g_i, \qquad
              v_d = \frac1{n_d} \sum_{i \in d} (g_i - m_d)^2

    Args:
        grads: per-sample gradients ``[N, P]``, floating point.
        order: sample numbers sorted by domain ``[M]``, int64, each sample at most once; one that is
            not there belongs to no domain (see `fastdg.domains.Partition`).
        offsets: ``[D + 1]`` int64, ascending from 0 to M; domain d is
            ``order[offsets[d]:offsets[d + 1]]``. On the CPU the numbers in both are checked; on
            another device they are trusted, unless ``FASTDG_CHECK_INDICES=1`` has them read.

    Returns:
        ``(mean, variance)``, each ``[D, P]`` in float32, or in float64 for gradients in float64;
        zeros for an empty domain. Differentiable once.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or ``order`` and
            ``offsets`` are no partition.
    """
    return call("moments", grads, order, offsets)
