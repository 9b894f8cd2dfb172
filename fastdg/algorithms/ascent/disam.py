"""DISAM: SAM whose ascent lets no domain run ahead."""

from __future__ import annotations

from torch import Tensor

from ...core.hyper import check_weight, hyper
from ...core.step_batch import StepBatch
from .sam import SAM


class DISAM(SAM):
    r"""Domain-inspired sharpness-aware minimization.

    .. math::
        g &= \nabla\Bigl[\tfrac1N\sum_i\ell_i(\theta) - \lambda \operatorname{Var}_d L_d(\theta)
        \Bigr], \qquad e = \rho\,\frac{g}{\lVert g\rVert} \\
        \nabla &= \nabla\,\tfrac1N\sum_i\ell_i(\theta + e)

    :math:`L_d` is the mean loss of a domain; the variance over the domains of the batch is biased.
    Domains whose loss is large already are perturbed less.

    A step is made as with `SAM`, which has all arguments but the weight. It goes around a plain
    optimizer or a term, since the first gradient is of an objective of its own.

    Args:
        rho: :math:`\rho`.
        variance_weight: :math:`\lambda`; 0.1 in the official README.

    ``statistics`` also holds ``variance``, :math:`\operatorname{Var}_d L_d(\theta)`. The official
    code lets every forward move the running statistics of batch norm: ``buffers="all"``.

    Reference:
        Zhang, Xu, Yu, Zhang, Tian, Wang: Domain-Inspired Sharpness-Aware Minimization Under Domain
        Shifts, ICLR 2024.
    """

    prefix = "disam"
    compares = True
    around_algorithms = False

    variance_weight: float = hyper(0.1, check_weight)

    def objective(self, batch: StepBatch) -> Tensor:
        if self._visit is not None:  # at the worst weights
            return batch.loss
        gap = batch.domain_losses - batch.domain_mean(batch.domain_losses)
        variance = batch.domain_mean(gap.square())
        batch.log(variance=variance)
        return batch.loss - self.variance_weight * variance
