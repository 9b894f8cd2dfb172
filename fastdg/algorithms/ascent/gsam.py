"""GSAM: SAM without the part of the gradient that only makes the loss larger."""

from __future__ import annotations

from ...core.hyper import check_weight, hyper
from ...outer.ascent import Offsets
from ...outer.vector import Vector
from .sam import SAM


class GSAM(SAM):
    r"""Surrogate gap guided sharpness-aware minimization.

    .. math::
        g_p = \nabla L\Bigl(\theta + \rho\,\frac{g}{\lVert g\rVert}\Bigr), \qquad
        \nabla = g_p - \alpha\,\Bigl(g - \frac{\langle g, g_p\rangle}{\lVert g_p\rVert^2}\,g_p\Bigr)

    It descends the loss at the worst weights near by, and ascends the part of
    :math:`g = \nabla L(\theta)` that is orthogonal to that: the gap between both losses shrinks.

    A step is made as with `SAM`, which has all arguments but alpha.

    Args:
        alpha: :math:`\alpha`; the authors' example for CIFAR has 0.2, with ``adaptive=True`` and a
            rho of 2.

    Reference:
        Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu: Surrogate Gap Minimization
        Improves Sharpness-Aware Training, ICLR 2022; code: juntang-zhuang/GSAM.
    """

    prefix = "gsam"

    alpha: float = hyper(0.2, check_weight)

    def offsets(self, gradient: Vector) -> Offsets:
        ascended = yield self.worst(gradient)
        return ascended - self.alpha * gradient.beside(ascended)
