"""RDM: the losses of the worst domain are distributed as all losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.annealed import Annealed
from ...core.hyper import check_count, check_rate, check_weight, hyper
from ...core.step_batch import StepBatch
from ..features.gaussians import gaussians

GAMMAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)


class RDM(Annealed):
    r"""Risk distribution matching: ``objective = mean of the domains' losses + w * penalty +
    v * variance``.

    .. math::
        \text{penalty} = \bar k_{ww} + \bar k_{aa} - 2\bar k_{wa}, \qquad
        \text{variance} = \operatorname{Var}_{i\in w}\ell_i + \operatorname{Var}_i\ell_i

    w are the samples of the domain with the largest mean loss, a are all samples, and
    :math:`\bar k` means of :math:`k(x,y) = \sum_{m=-4}^{3}\exp(-10^m (x-y)^2)` over pairs of
    losses. One plain backward: the penalty is a weighting of the samples. Domains may have
    different sizes, which the official code does not take.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a term.
        penalty_weight: w from step ``anneal_steps`` on; the authors' 5, and 0.5 for DomainNet.
        variance_weight: v from then on; the authors' 0.004, and 0 for OfficeHome, TerraIncognita
            and DomainNet.
        anneal_steps: steps before that, with ``pre_anneal_weight`` and no variance.
        pre_anneal_weight: w before ``anneal_steps``.
        lr_after_anneal: learning rate of all groups from then on; None: it stays.
            DomainBed has 1.5e-5.
        reset_base: clear the wrapped optimizer's state (moments, steps) when the anneal ends.
        num_domains: D; default: as many as have been seen. A domain without samples in a batch
            takes no part in it; the variance of one sample is 0.
        model: its parameters' names are used in messages.

    ``statistics`` holds ``loss``, ``penalty``, ``variance``, ``objective`` (0-dim), ``domain_loss``
    (``[D]``, NaN for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Nguyen, Do, Duong, Nguyen: Domain Generalization via Risk Distribution Matching, WACV 2024.
    """

    prefix = "rdm"
    compares = True
    looks_at_samples = False

    penalty_weight: float = hyper(5.0, check_weight)
    variance_weight: float = hyper(0.004, check_weight)
    anneal_steps: int = hyper(1500, check_count)
    pre_anneal_weight: float = hyper(0.0, check_weight)
    lr_after_anneal: float | None = hyper(None, check_rate)

    def objective(self, batch: StepBatch) -> Tensor:
        losses = batch.gathered([part.losses for part in batch.parts])
        worst = batch.domain_losses.detach().where(batch.present, -torch.inf).argmax()
        members = batch.membership.index_select(0, worst.view(1))[0].to(losses.dtype)
        groups = torch.stack([members, torch.ones_like(losses)])
        count = groups.sum(1)
        shares = groups / count.unsqueeze(1)
        kernels = gaussians(losses.unsqueeze(1), GAMMAS)
        difference = (shares[0] - shares[1]).to(kernels.dtype)
        penalty = (difference @ kernels @ difference).to(losses.dtype)
        gaps = losses - (shares @ losses).unsqueeze(1)
        variance = ((groups * gaps.square()).sum(1) / (count - 1).clamp(min=1)).sum()
        objective = batch.penalised(batch.domain_mean(batch.domain_losses), self.weight, penalty)
        if self.steps >= self.anneal_steps and self.variance_weight > 0:
            objective = objective + self.variance_weight * variance
        batch.log(variance=variance, objective=objective)
        return objective
