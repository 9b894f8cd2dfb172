"""EQRM: a high quantile of the domains' risks."""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor
from torch.special import ndtr

from ...core.annealed import Annealed
from ...core.hyper import check_count, check_inside, check_one_of, check_rate, fixed, hyper
from ...core.step_batch import StepBatch

GRID, ROUNDS = 1025, 6  # points in the interval that holds the quantile, and its refinements
ROUNDING = 1e-12


class EQRM(Annealed):
    r"""Empirical quantile risk minimization: ``objective = quantile of the domains' losses``.

    The distribution of risks over domains is estimated by Gaussian kernels around the domains'
    losses :math:`\ell_d`; the objective q solves

    .. math::
        \frac1D\sum_d \Phi\Bigl(\frac{q - \ell_d}{h}\Bigr) = \alpha, \qquad
        h = 1.06\,\operatorname{std}(\ell)\,D^{-1/5}

    With :math:`z_d = (q-\ell_d)/h` and the normal density :math:`\varphi`, its derivative is

    .. math::
        \frac{\partial q}{\partial \ell_d} = \frac{\varphi(z_d)}{\sum_e\varphi(z_e)} +
        \frac{\partial h}{\partial \ell_d}\,\frac{\sum_e\varphi(z_e)\,z_e}{\sum_e\varphi(z_e)}

    so a step is one plain backward with a weight for each domain; the weights sum to 1.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a term.
        quantile: :math:`\alpha` in (0, 1).
        anneal_steps: steps on the mean of the domains' losses before (the burn-in).
        lr_after_anneal: learning rate of all groups from then on; None: it stays. DomainBed: 1e-6.
        reset_base: clear the wrapped optimizer's state (moments, steps) when the burn-in ends.
        gradient: ``"exact"``: of q, as above. ``"domainbed"``: DomainBed's, which differentiates
            the ends of the bisection's interval alone, :math:`\min\ell + h z_\alpha` and
            :math:`\max\ell + h z_\alpha`: another direction (cosine 0.64 to 0.88 in examples).
        num_domains: D; default: as many as have been seen. A domain without samples in a batch
            takes no part in it; of one domain alone q is its loss.
        model: its parameters' names are used in messages.

    ``statistics`` holds ``loss``, ``objective`` (0-dim), ``weights`` (``[D]``, the derivative of
    the objective), ``domain_loss`` (``[D]``, NaN for an empty domain) and ``domain_count``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Eastwood, Robey, Singh, von Kügelgen, Hassani, Pappas, Schölkopf: Probable Domain
        Generalization via Quantile Risk Minimization, NeurIPS 2022.
    """

    prefix = "eqrm"
    compares = True
    looks_at_samples = False
    penalty_weight: float = fixed(1.0, init=False)
    pre_anneal_weight: float = fixed(0.0, init=False)

    quantile: float = hyper(0.75, check_inside)
    anneal_steps: int = hyper(2500, check_count)
    lr_after_anneal: float | None = hyper(None, check_rate)
    gradient: Literal["exact", "domainbed"] = hyper("exact", check_one_of("exact", "domainbed"))

    def objective(self, batch: StepBatch) -> Tensor:
        losses, weights = batch.domain_losses, batch.shares
        value = batch.domain_mean(losses).detach()
        if self.weight:
            value, weights = self.quantile_of(losses.detach().double(), batch.present)
        weights = weights.to(losses.dtype)
        batch.log(objective=value.to(losses.dtype), weights=weights)
        return (weights * losses).sum()

    def quantile_of(self, losses: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quantile of the losses of the domains that are present, and its derivative."""
        count = present.sum()
        share = present.to(losses.dtype) / count
        gap = (losses - (share * losses).sum()) * present
        std = (gap.square().sum() / (count - 1).clamp(min=1)).sqrt()
        h = (factor := 1.06 * count.to(losses.dtype) ** -0.2) * std
        tiny = torch.finfo(losses.dtype).tiny
        deviate = NormalDist().inv_cdf(self.quantile)
        ends = torch.stack(
            [losses.where(present, torch.inf).min(), losses.where(present, -torch.inf).max()]
        )
        ends = ends + h * deviate
        low, high = ends
        steps = torch.linspace(0, 1, GRID, dtype=losses.dtype, device=losses.device)
        for _ in range(ROUNDS):  # each looks at all points at once: few launches
            points = torch.lerp(low, high, steps)
            cdf = ndtr((points.unsqueeze(1) - losses) / h.clamp(min=tiny)) @ share
            place = (cdf < self.quantile).sum().clamp(1, GRID - 1)
            low, high = points.index_select(0, torch.stack([place - 1, place])).unbind()
        q = high
        dh = factor * gap / ((count - 1).clamp(min=1) * std.clamp(min=tiny))
        if self.gradient == "exact":
            z = (q - losses) / h.clamp(min=tiny)
            density = (-z.square() / 2).where(present, -torch.inf).softmax(0)
            weights = density + dh * (density * z).sum()
        else:
            least = losses == losses.where(present, torch.inf).min()
            most = losses == losses.where(present, -torch.inf).max()
            part = ((q - ends[0]) / (ends[1] - ends[0]).clamp(min=tiny)).clamp(0, 1)
            weights = (1 - part) * _first(least & present) + part * _first(most & present)
            weights = weights + dh * deviate
        apart = std > ROUNDING * losses.abs().max()  # of equal losses h has no derivative
        return q, weights.where(apart, share)


def _first(mask: Tensor) -> Tensor:
    """Return 1 at the first true entry, else 0."""
    return (mask & (mask.cumsum(0) == 1)).to(torch.float64)
