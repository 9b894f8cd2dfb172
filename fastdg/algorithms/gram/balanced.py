"""IMTL-G, Aligned-MTL and ConFIG: no domain's gradient counts for more than another's."""

from __future__ import annotations

from typing import Literal

from ... import weightings
from ...core.hyper import check_reduction, hyper
from .rule import GramRule


class IMTLG(GramRule):
    r"""Impartial multi-task learning: a gradient with the same projection onto each domain's.

    .. math::
        \text{grad} = \sum_d w_d\, g_d, \qquad
        w = \frac{K^{+} n}{\mathbf{1}^\top K^{+} n}, \quad n_d = |g_d|

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        absent, num_domains, model, check: as in `GramSurgery`.

    Weights may be negative, and large where gradients are nearly dependent; see
    `fastdg.weightings.IMTLG`.

    Reference:
        Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: Towards Impartial Multi-task Learning,
        ICLR 2021.
    """

    prefix = "imtlg"
    rule = weightings.IMTLG


class AlignedMTL(GramRule):
    r"""Independent component alignment: all principal components get the shortest one's length.

    .. math:: \text{grad} = \sum_d w_d\, g_d, \qquad
        w = \sqrt{\lambda_{\min}}\; V \Lambda^{-1/2} V^\top \tfrac1D \mathbf{1},
        \quad K = V \Lambda V^\top

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        reduction: ``"mean"``, or ``"sum"``: D times that, as in LibMTL.
        absent, num_domains, model, check: as in `GramSurgery`.

    Reference:
        Senushkin, Patakin, Kuznetsov, Konushin: Independent Component Alignment for Multi-Task
        Learning, CVPR 2023, arXiv:2305.19000.
    """

    prefix = "alignedmtl"
    rule = weightings.AlignedMTL

    reduction: Literal["mean", "sum"] = hyper("mean", check_reduction)


class ConFIG(GramRule):
    r"""Conflict-free inverse gradients: the same angle to every domain's gradient.

    .. math::
        \text{grad} = \Big(\sum_d \langle g_d, v\rangle\Big)\, v, \qquad
        v \propto \Big[\frac{g_1}{|g_1|}, \dots, \frac{g_D}{|g_D|}\Big]^{+\top} \mathbf{1},
        \quad |v| = 1

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        absent, num_domains, model, check: as in `GramSurgery`.

    It is as long as all projections onto it together: about D times the mean gradient where the
    domains agree. See `fastdg.weightings.ConFIG`.

    Reference:
        Liu, Chu, Thuerey: ConFIG: Towards Conflict-free Training of Physics Informed Neural
        Networks, ICLR 2025, arXiv:2408.11104.
    """

    prefix = "config"
    rule = weightings.ConFIG
