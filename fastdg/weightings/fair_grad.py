"""FairGrad: every domain's progress at the power that alpha-fairness gives it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.hyper import check_steepness
from .gram import Gram, GramWeighting, stops

ROUNDS = 40


class FairGrad(GramWeighting):
    r"""Fair resource allocation: the step whose progress of each domain is alpha-fair.

    .. math:: K w = w^{-1/\alpha}, \qquad w > 0

    The larger :math:`\alpha`, the more the domain with the least progress counts: 1 is
    proportional fairness (`NashMTL`), and as it grows the least progress is maximised. The weights
    grow as the gradients get smaller, :math:`w(sK) = s^{-\alpha/(1+\alpha)}\, w(K)`; their
    direction does not depend on s. A gradient of zeros has weight 0. Where a convex combination is
    zero there is no solution, and these weights, as large as the dtype's rounding allows, have a
    combination near zero.

    Args:
        alpha: > 0. Default: LibMTL's.

    The authors' code, TorchJD and LibMTL leave the equation to scipy's ``least_squares``; here it
    is the minimum of a convex function by damped Newton steps, on the device: 40, or on the CPU
    until they have converged (about 8).

    Reference:
        Ban, Ji: Fair Resource Allocation in Multi-Task Learning, ICML 2024, arXiv:2402.15638.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        check_steepness("alpha", alpha)
        self.alpha = alpha

    def weights(self, gram: Gram) -> Tensor:
        power = 1 / self.alpha
        return fair(gram, power) * gram.scale ** (-1 / (1 + power))


def fair(gram: Gram, power: float) -> Tensor:
    r"""Solve :math:`K w = w^{-p}` on the matrix at one scale; weights are 0 where a gradient is.

    With :math:`x = n w` it is :math:`C x = a\, x^{-p}`, :math:`a = n^{p-1}`, where the gradient of
    :math:`\tfrac12 x^\top C x - \sum_d a_d\, x_d^{1-p} / (1-p)` vanishes. A Newton step is damped
    as far as the curvature may grow along it, so that each one descends, and no weight falls below
    a hundredth of its last value.
    """
    matrix, drive = gram.firm(), gram.norms ** (power - 1)
    x = drive ** (1 / (1 + power))  # the solution at right angles
    for _ in range(ROUNDS):
        pull = drive * x**-power
        step = pull - matrix @ x
        step = torch.linalg.solve_ex(matrix + torch.diag(power * pull / x), step)[0]
        relative = step / x
        shrinks = (-relative).amax().clamp(min=1e-300)
        rate = -torch.expm1(-torch.log1p(power * shrinks) / power).clamp(min=-0.99) / shrinks
        x = x + rate * step
        if stops(relative.abs().amax() < 1e-14):
            break
    return torch.where(gram.present, x / gram.norms, 0.0)
