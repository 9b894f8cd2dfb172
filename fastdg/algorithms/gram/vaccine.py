"""GradVac: gradients turned towards each other as far as they usually agree."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ... import weightings
from ...core.combine.seeded import RandomCombiner
from ...core.hyper import check_reduction, check_share, hyper
from .rule import GramRule


class GradVac(GramRule, RandomCombiner):
    r"""Gradient vaccine: PCGrad with the angle that two domains usually have in place of a right
    one.

    For each domain i, from :math:`p_i = g_i` on and for the others j in a random order: where
    :math:`\phi = \cos(p_i, g_j)` is below its average :math:`\hat\phi_{ij}`, a multiple of
    :math:`g_j` is added to :math:`p_i` that brings it there; then :math:`\hat\phi_{ij}` moves by
    :math:`\beta` towards :math:`\phi`. The gradient is :math:`\sum_i p_i`. See
    `fastdg.weightings.GradVac` for the formula.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        beta: share of a new cosine in the average.
        reduction: ``"sum"``, the paper's, or ``"mean"`` over the domains.
        generator: where the orders come from, on the CPU, on several ranks rank 0's. Its state is
            kept in ``state_dict``, as the averages are. Default: torch's own.
        absent, num_domains, model, check: as in `GramSurgery`.

    Reference:
        Wang, Tsvetkov, Firat, Cao: Gradient Vaccine: Investigating and Improving Multi-task
        Optimization in Massively Multilingual Models, ICLR 2021, arXiv:2010.05874.
    """

    prefix = "gradvac"
    rule = weightings.GradVac

    beta: float = hyper(0.5, check_share)
    reduction: Literal["sum", "mean"] = hyper("sum", check_reduction)

    def ask(self, gram: Tensor) -> Tensor:
        device = torch.device("cpu") if self.generator is None else self.generator.device
        weighting: Any = self.weighting
        weighting.generator = self.generator_on(device)
        try:
            return super().ask(gram)
        finally:
            weighting.generator = None  # this one keeps it
