"""Nash-MTL and FairGrad: progress shared out among the domains."""

from __future__ import annotations

from ... import weightings
from ...core.hyper import check_norm, check_steepness, check_steps, check_switch, hyper
from .rule import GramRule


class NashMTL(GramRule):
    r"""The Nash bargaining solution: the largest product of all domains' progress.

    .. math:: \text{grad} = \sum_d w_d\, g_d, \qquad K w = 1 / w, \quad w > 0

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        update_every: solve in every so many steps, and keep the weights in between; they are in
            ``state_dict``.
        frobenius: divide K by its Frobenius norm first, as the authors' code does; else the length
            of the gradient is :math:`\sqrt D` throughout.
        max_norm: shorten a longer gradient to this length; the authors' code has 1.
        absent, num_domains, model, check: as in `GramSurgery`.

    Reference:
        Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: Multi-Task Learning as a
        Bargaining Game, ICML 2022, arXiv:2202.01017.
    """

    prefix = "nashmtl"
    rule = weightings.NashMTL

    update_every: int = hyper(1, check_steps)
    frobenius: bool = hyper(False, check_switch)
    max_norm: float | None = hyper(None, check_norm)


class FairGrad(GramRule):
    r"""Alpha-fair progress of the domains.

    .. math:: \text{grad} = \sum_d w_d\, g_d, \qquad K w = w^{-1/\alpha}, \quad w > 0

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        alpha: 1: proportional fairness, `NashMTL`'s; the larger, the more the domain with the
            least progress counts.
        absent, num_domains, model, check: as in `GramSurgery`.

    Reference:
        Ban, Ji: Fair Resource Allocation in Multi-Task Learning, ICML 2024, arXiv:2402.15638.
    """

    prefix = "fairgrad"
    rule = weightings.FairGrad

    alpha: float = hyper(1.0, check_steepness)
