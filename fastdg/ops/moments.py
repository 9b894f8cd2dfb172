"""``moments``: mean and biased variance of given per-sample gradients, by domain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .derivatives import call, differentiable, not_differentiable
from .registry import define


def reference(grads: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    domain = domain_of(order, offsets)
    count = (offsets[1:] - offsets[:-1]).clamp(min=1).to(grads.dtype).unsqueeze(1)
    zero = grads.new_zeros((offsets.numel() - 1, grads.shape[1]))
    mean = zero.index_add(0, domain, grads) / count
    centred = grads - mean[domain]  # two passes: never negative, and exact where one pass cancels
    return mean, zero.index_add(0, domain, centred * centred) / count


def domain_of(order: Tensor, offsets: Tensor) -> Tensor:
    """Domain of each sample ``[N]`` from the partition, without leaving the device."""
    rank = torch.arange(order.numel(), device=order.device)
    sorted_domain = torch.searchsorted(offsets[1:].contiguous(), rank, right=True)
    return torch.empty_like(order).index_copy_(0, order, sorted_domain)


def _fake(grads: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    shape = (offsets.shape[0] - 1, grads.shape[1])
    return grads.new_empty(shape), grads.new_empty(shape)


def reference_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    grads: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> Tensor:
    domain = domain_of(order, offsets)
    count = (offsets[1:] - offsets[:-1]).clamp(min=1).to(grads.dtype).unsqueeze(1)
    centred = grads - mean[domain]
    return (2 * centred * grad_variance[domain] + grad_mean[domain]) / count[domain]


def _fake_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    grads: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> Tensor:
    return torch.empty_like(grads, memory_format=torch.contiguous_format)


define("moments(Tensor grads, Tensor order, Tensor offsets) -> (Tensor, Tensor)", reference, _fake)
define(
    "moments_backward(Tensor grad_mean, Tensor grad_variance, Tensor grads, Tensor mean, "
    "Tensor order, Tensor offsets) -> Tensor",
    reference_backward,
    _fake_backward,
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
    "moments_backward", "moments is differentiable once: use its result in one backward"
)


def moments(grads: Tensor, order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and biased variance of per-sample gradients, by domain.

    .. math:: m_d = \frac1{n_d} \sum_{i \in d} g_i, \qquad
              v_d = \frac1{n_d} \sum_{i \in d} (g_i - m_d)^2

    Args:
        grads: per-sample gradients ``[N, P]``, floating point.
        order: sample numbers sorted by domain ``[N]``, int64 (see `fastdg.domains.Partition`).
        offsets: ``[D + 1]`` int64; domain d is ``order[offsets[d]:offsets[d + 1]]``.

    Returns:
        ``(mean, variance)``, each ``[D, P]``; zeros for an empty domain. Differentiable once.
    """
    return call("moments", grads, order, offsets)
