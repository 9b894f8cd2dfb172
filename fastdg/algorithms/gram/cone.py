"""UPGrad and DualProj: gradients projected onto the directions that hurt no domain."""

from __future__ import annotations

from ... import weightings
from ...core.hyper import check_weight, hyper
from .rule import GramRule


class UPGrad(GramRule):
    r"""The mean of the gradients, each projected onto the dual cone of all.

    .. math:: \text{grad} = \tfrac1D \sum_i \arg\min_d\, |d - g_i|
        \quad\text{s.t. } \langle g_j, d\rangle \ge 0 \text{ for all } j

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        reg_eps: see `fastdg.weightings.UPGrad`; 1e-4 is TorchJD's.
        absent, num_domains, model, check: as in `GramSurgery`.

    Reference:
        Quinton, Rey: Jacobian Descent for Multi-Objective Optimization, 2024, arXiv:2406.16232.
    """

    prefix = "upgrad"
    rule = weightings.UPGrad

    reg_eps: float = hyper(0.0, check_weight)


class DualProj(GramRule):
    r"""The mean of the gradients, projected onto the dual cone of all.

    .. math:: \text{grad} = \arg\min_d\, |d - g_0|
        \quad\text{s.t. } \langle g_j, d\rangle \ge 0 \text{ for all } j,
        \qquad g_0 = \tfrac1D \textstyle\sum_i g_i

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        reg_eps: as in `UPGrad`.
        absent, num_domains, model, check: as in `GramSurgery`.

    Reference:
        Lopez-Paz, Ranzato: Gradient Episodic Memory for Continual Learning, NeurIPS 2017,
        arXiv:1706.08840, which projects the newest task's gradient; of the mean, as in TorchJD.
    """

    prefix = "dualproj"
    rule = weightings.DualProj

    reg_eps: float = hyper(0.0, check_weight)
