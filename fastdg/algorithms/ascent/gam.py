"""GAM: flat to first order, too."""

from __future__ import annotations

from ...core.hyper import check_weight, hyper
from ...outer.ascent import Ascent, Offsets
from ...outer.vector import Vector


class GAM(Ascent):
    r"""Gradient norm aware minimization, in the accelerated form of the official code.

    With :math:`u(g) = g/\lVert g\rVert`, four gradients a step:

    .. math::
        g_0 &= \nabla L(\theta), & g_1 &= \nabla L(\theta + r' u(g_0)), \\
        \theta' &= \theta + r\,u(g_1 - g_0), & g_2 &= \nabla L(\theta'), \\
        & & g_3 &= \nabla L(\theta' + r' u(g_2)), \\
        a &= \beta_1 g_1 + \beta_3 g_3, & m &= g_0 + |\beta_2|\,g_2, \\
        \nabla &= a - \gamma\,\Bigl(m - \frac{\langle m, a\rangle}{\lVert a\rVert^2}\,a\Bigr)

    A step is made as with `SAM`, which has all arguments but these; the closure is called four
    times, or there are three calls of ``opt.ascend``.

    Args:
        grad_rho: :math:`r'`.
        grad_norm_rho: :math:`r`.
        beta1, beta2, beta3: :math:`\beta`; of the second only the size counts.
        gamma: :math:`\gamma`.

    The defaults are the official code's for CIFAR, xxgege/GAM. Its README names a further
    ``grad_beta_0``, which the code does not read.

    Reference:
        Zhang, Xu, Yu, Zou, Cui: Gradient Norm Aware Minimization Seeks First-Order Flatness and
        Improves Generalization, CVPR 2023.
    """

    prefix = "gam"
    points = 4

    grad_rho: float = hyper(0.02, check_weight)
    grad_norm_rho: float = hyper(0.2, check_weight)
    beta1: float = hyper(1.0, check_weight)
    beta2: float = hyper(1.0, check_weight)
    beta3: float = hyper(1.0, check_weight)
    gamma: float = hyper(0.03, check_weight)

    def offsets(self, gradient: Vector) -> Offsets:
        first = yield self.grad_rho * gradient.unit()
        there = self.grad_norm_rho * (first - gradient).unit()
        second = yield there
        third = yield there + self.grad_rho * second.unit()
        along = self.beta1 * first + self.beta3 * third
        return along - self.gamma * (gradient + self.beta2 * second).beside(along)
