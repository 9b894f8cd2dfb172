"""MGDA and CAGrad: convex combinations that are good for the worst domain."""

from __future__ import annotations

from typing import Literal

from ... import weightings
from ...core.hyper import check_reduction, check_weight, hyper
from ...weightings.cagrad import check_rescale
from .rule import GramRule


class MGDA(GramRule):
    r"""Multiple-gradient descent: along the shortest convex combination of the gradients.

    .. math:: \text{grad} = \sum_d w_d\, g_d, \qquad
        w = \arg\min_{w \ge 0,\ \sum_d w_d = 1} \Big|\sum_d w_d\, g_d\Big|^2

    Solved exactly, see `fastdg.weightings.MGDA`. It gets short near points from which no step
    improves all domains, and ends there.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        absent, num_domains, model, check: as in `GramSurgery`.

    Reference:
        Désidéri: Multiple-gradient descent algorithm (MGDA) for multiobjective optimization,
        Comptes Rendus Mathématique 350, 2012. Sener, Koltun: Multi-Task Learning as
        Multi-Objective Optimization, NeurIPS 2018, arXiv:1810.04650.
    """

    prefix = "mgda"
    rule = weightings.MGDA


class CAGrad(GramRule):
    r"""Conflict-averse gradient descent: the largest progress of the worst domain, near the mean.

    .. math::
        \text{grad} = \arg\max_d \min_i\, \langle g_i, d\rangle
        \quad\text{s.t. } |d - g_0| \le c\,|g_0|, \qquad g_0 = \tfrac1D \textstyle\sum_i g_i

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        c: the radius; 0 gives the mean gradient.
        rescale, reduction: the scales of other code, see `fastdg.weightings.CAGrad`. Defaults: the
            paper's.
        absent, num_domains, model, check: as in `GramSurgery`.

    Reference:
        Liu, Liu, Jin, Stone, Liu: Conflict-Averse Gradient Descent for Multi-task Learning,
        NeurIPS 2021, arXiv:2110.14048.
    """

    prefix = "cagrad"
    rule = weightings.CAGrad

    c: float = hyper(0.5, check_weight)
    rescale: Literal[0, 1, 2] = hyper(0, check_rescale)
    reduction: Literal["mean", "sum"] = hyper("mean", check_reduction)
