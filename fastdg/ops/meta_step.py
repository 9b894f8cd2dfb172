"""``meta_step``: the outer step of Fish and Reptile, in place, for all parameters at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .dispatch.derivatives import call, not_recorded
from .dispatch.registry import define
from .gradients import statistic_dtype


@torch.no_grad()
def reference(parameters: Sequence[Tensor], kept: Sequence[Tensor], rate: float) -> Tensor:
    sums = statistic_dtype(parameters[0].dtype)
    total = parameters[0].new_zeros((), dtype=torch.float64)
    for parameter, start in zip(parameters, kept, strict=True):
        delta = parameter.to(sums) - start
        total += delta.double().square().sum()
        start.copy_(torch.lerp(start.to(sums), parameter.to(sums), rate))
        parameter.copy_(start)
    return total.to(sums)


def _fake(parameters: Sequence[Tensor], kept: Sequence[Tensor], rate: float) -> Tensor:
    return parameters[0].new_empty((), dtype=statistic_dtype(parameters[0].dtype))


def check(parameters: Sequence[Tensor], kept: Sequence[Tensor], rate: float) -> None:
    if len(parameters) == 0:
        raise ValueError("parameters: expected at least one tensor, got none. Pass the weights.")
    if len(parameters) != len(kept):
        raise ValueError(
            f"kept: expected a tensor for each of the {len(parameters)} parameters, "
            f"got {len(kept)}. Pass a clone of each."
        )
    checks.floating("parameters[0]", parameters[0])
    checks.alike("parameters", parameters, parameters[0], "parameters[0]")
    checks.alike("kept", kept, parameters[0], "parameters[0]")
    checks.shaped("kept", kept, [x.shape for x in parameters], "parameters")
    checks.finite("rate", rate)
    checks.written(parameters=parameters, kept=kept)


define(
    "meta_step(Tensor(a!)[] parameters, Tensor(b!)[] kept, float rate) -> Tensor",
    reference,
    _fake,
    check,
)
not_recorded("meta_step")


def meta_step(parameters: Sequence[Tensor], kept: Sequence[Tensor], rate: float) -> Tensor:
    r"""Interpolate from kept weights to the present ones, in place, and keep the result.

    .. math:: \theta \leftarrow \theta_0 + \epsilon\,(\theta - \theta_0), \qquad
              \theta_0 \leftarrow \theta

    Exact at both ends: a rate of 0 restores the kept weights, a rate of 1 the present ones.

    Args:
        parameters: the weights :math:`\theta` after the inner steps; overwritten.
        kept: the weights :math:`\theta_0` before them, of the same shapes, dtype and device;
            overwritten with the same numbers as ``parameters``.
        rate: :math:`\epsilon`, DomainBed's ``meta_lr``.

    Returns:
        :math:`\|\theta - \theta_0\|^2` before the step, 0-dim: the squared distance of the inner
        steps. Summed in float64, returned in float32, or in float64 for weights in float64.
        Autograd does not record it.

    Raises:
        TypeError, ValueError: the lists are empty or differ in length, shapes, dtype or device,
            something is not a dense floating-point tensor, two tensors or two elements share
            memory, or ``rate`` is not finite.

    Papers: Shi et al., "Gradient matching for domain generalization" (ICLR 2022); Nichol et al.,
    "On first-order meta-learning algorithms" (2018).
    """
    with torch.no_grad():
        return call("meta_step", list(parameters), list(kept), rate)
