"""Base of algorithms that match the features of the domains."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ...core.hyper import check_weight, hyper
from ...core.optimizer import DomainOptimizer
from ...core.step_batch import StepBatch


def all_features(batch: StepBatch) -> Tensor:
    """Return the features of all samples ``[N, F]``, with their graph; of all micro-batches and
    ranks."""
    inputs = [x.reshape(len(x), -1) for x in batch.input("features", differentiable=True)]
    widths = [x.shape[1] for x in inputs]
    if len({*widths}) > 1:
        raise ValueError(
            f"features: expected as many features in all micro-batches of a step, got {widths}. "
            "Pass the output of the same layer, pooled over positions if their number differs."
        )
    return batch.gathered(inputs)


def features_by_domain(batch: StepBatch) -> tuple[Tensor, Tensor]:
    """Return the features of all samples ``[N, F]``, with their graph, and 1 where a sample belongs
    to a domain, else 0, ``[D, N]``; of all micro-batches and ranks."""
    features = all_features(batch)
    return features, batch.membership.to(features.dtype)


class FeatureMatching(DomainOptimizer):
    """Base of ``objective = mean of the domains' losses + w * penalty``, with a penalty on the
    features of the samples, an input of `backward`."""

    compares = True
    looks_at_samples = False
    takes = ("features",)

    penalty_weight: float = hyper(1.0, check_weight)

    def objective(self, batch: StepBatch) -> Tensor:
        with torch.set_grad_enabled(self.penalty_weight > 0):
            penalty = self.penalty(*self.groups(batch))
        return batch.penalised(batch.domain_mean(batch.domain_losses), self.penalty_weight, penalty)

    def groups(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Return the arguments of `penalty`: those of `features_by_domain`, unless overridden."""
        return features_by_domain(batch)

    @abstractmethod
    def penalty(self, features: Tensor, membership: Tensor) -> Tensor:
        """Compute the penalty, 0-dim.

        Args:
            features: ``[N, F]``, of all micro-batches and ranks.
            membership: 1 where a sample belongs to a domain, else 0, ``[D, N]``.
        """
