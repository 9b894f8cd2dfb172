"""IB-ERM: little variance of the features within a domain."""

from __future__ import annotations

from torch import Tensor

from ...core.annealed import Annealed
from ...core.hyper import check_weight, hyper
from ...core.step_batch import StepBatch
from .matching import features_by_domain


def feature_variance(batch: StepBatch) -> Tensor:
    """Average the unbiased variance of features within each domain, 0-dim."""
    features, membership = features_by_domain(batch)
    count = membership.sum(1)
    mean = membership @ features / count.clamp(min=1).unsqueeze(1)
    squares = (features - membership.t() @ mean).square().mean(1)
    return batch.domain_mean(membership @ squares / (count - 1).clamp(min=1))


class IBERM(Annealed):
    r"""Information bottleneck: ``objective = mean of the domains' losses + w * penalty``.

    .. math::
        \text{penalty} = \frac1{DF}\sum_d\sum_k \operatorname{Var}_{i \in d} z_{ik}

    with z the features and the unbiased variance, an upper bound of their entropy. The defaults are
    DomainBed's.

    Pass the features ``[N, *]``, with their graph, to `backward`.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a term.
        penalty_weight: w from step ``anneal_steps`` on.
        anneal_steps: steps before that, with ``pre_anneal_weight``.
        pre_anneal_weight: w before ``anneal_steps``.
        reset_base: clear the wrapped optimizer's state (moments, steps) when the anneal ends.
        num_domains: D; default: as many as have been seen. A domain without samples in a batch
            takes no part in it; the variance of one sample is 0.
        model: its parameters' names are used in messages.

    ``statistics`` holds ``loss``, ``penalty``, ``objective`` (0-dim), ``domain_loss`` (``[D]``, NaN
    for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Ahuja, Caballero, Zhang, Gagnon-Audet, Bengio, Mitliagkas, Rish: Invariance Principle Meets
        Information Bottleneck for Out-of-Distribution Generalization, NeurIPS 2021.
    """

    prefix = "ib_erm"
    looks_at_samples = False
    takes = ("features",)

    penalty_weight: float = hyper(100.0, check_weight)
    pre_anneal_weight: float = hyper(0.0, check_weight)

    def objective(self, batch: StepBatch) -> Tensor:
        risk = batch.domain_mean(batch.domain_losses)
        return batch.penalised(risk, self.weight, feature_variance(batch))
