"""IB-IRM: IRM, and little variance of the features within a domain."""

from __future__ import annotations

from torch import Tensor

from ...core.hyper import check_count, check_weight, hyper
from ...core.step_batch import StepBatch
from ..irm import IRM
from .ib_erm import feature_variance


class IBIRM(IRM):
    r"""Invariant risk minimization with an information bottleneck:
    ``objective = IRM's objective + w_b * bottleneck``.

    The bottleneck is the penalty of `IBERM`. Pass the features ``[N, *]``, with their graph, to
    `backward`; logits are found as in `IRM`, whose arguments these have beside:

    Args:
        bottleneck_weight: :math:`w_b` from step ``bottleneck_anneal_steps`` on; 0 before.
        bottleneck_anneal_steps: steps before that. The wrapped optimizer starts anew then, too, if
            ``reset_base``.

    ``statistics`` also holds ``bottleneck``, 0-dim; ``objective`` is the whole one.

    Reference:
        Ahuja, Caballero, Zhang, Gagnon-Audet, Bengio, Mitliagkas, Rish: Invariance Principle Meets
        Information Bottleneck for Out-of-Distribution Generalization, NeurIPS 2021.
    """

    prefix = "ib_irm"
    takes = ("logits", "features")

    bottleneck_weight: float = hyper(100.0, check_weight)
    bottleneck_anneal_steps: int = hyper(500, check_count)

    def objective(self, batch: StepBatch) -> Tensor:
        objective, bottleneck = super().objective(batch), feature_variance(batch)
        on = self.steps >= self.bottleneck_anneal_steps
        if on and self.bottleneck_weight > 0:
            objective = objective + self.bottleneck_weight * bottleneck
        batch.log(bottleneck=bottleneck, objective=objective)
        return objective

    def _prepare(self) -> None:
        super()._prepare()
        ends = self.bottleneck_anneal_steps
        if ends and self.steps == ends != self.anneal_steps:
            self.renew_base()
