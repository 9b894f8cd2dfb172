"""SAGM: the gradients at the weights and at worse weights near by are matched."""

from __future__ import annotations

from ...core.hyper import check_weight, hyper
from ...outer.ascent import Ascent, Offsets
from ...outer.vector import TINY, Vector


class SAGM(Ascent):
    r"""Sharpness-aware gradient matching.

    .. math::
        g = \nabla L(\theta), \qquad
        \nabla = \tfrac12\Bigl[g + \nabla L\Bigl(\theta +
        \bigl(\tfrac{\rho}{\lVert g\rVert} - \alpha\bigr)\,g\Bigr)\Bigr]

    To first order it descends the loss, the loss at the worst weights near by, and the gap between
    both, for which their gradients have to point the same way.

    A step is made as with `SAM`, which has all arguments but alpha.

    Args:
        rho: :math:`\rho`.
        alpha: :math:`\alpha`; the paper's 0.001 for PACS, VLCS and TerraIncognita, 0.0005 for
            OfficeHome and DomainNet. Its learning rates there are 1e-5 to 3e-5.

    The factor 1/2 is the official code's, Wang-pengfei/SAGM; the paper's objective is the sum.

    Reference:
        Wang, Zhang, Lei, Zhang: Sharpness-Aware Gradient Matching for Domain Generalization,
        CVPR 2023.
    """

    prefix = "sagm"

    rho: float = hyper(0.05, check_weight)
    alpha: float = hyper(0.001, check_weight)

    def offsets(self, gradient: Vector) -> Offsets:
        ascended = yield (self.rho / (gradient.norm() + TINY) - self.alpha) * gradient
        return 0.5 * (gradient + ascended)
