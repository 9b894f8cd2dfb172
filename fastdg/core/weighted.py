"""Algorithms that need no gradient but that of a weighted sum of the domains' losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..domains import partition
from ..gradients.tape import Resolved
from ..statistics.factors import accumulated
from ..statistics.moments import rows
from .batch import Batch, descend, domain_means, loss_sums, scaled, shared_terms, total_loss
from .global_batch import Whole
from .optimizer import DomainOptimizer

UNSEEN = Resolved()


@dataclass(frozen=True)
class Losses:
    """The losses of everything staged on all ranks, detached.

    Attributes:
        mean: over all samples, 0-dim.
        domain: mean of each domain ``[D]``, NaN for an empty one.
        count: samples of each domain ``[D]``, int64.
    """

    mean: Tensor
    domain: Tensor
    count: Tensor

    @classmethod
    def of(cls, staged: Sequence[Batch], whole: Whole, domains: int = 0) -> Losses:
        """For no fewer than so many ``domains``."""
        count = rows(whole.count, max(domains, whole.counts.shape[1]))
        total, sums = whole.total([total_loss(staged).detach(), loss_sums(staged, len(count))])
        return cls(total / whole.samples, domain_means(sums, count), count)

    @property
    def present(self) -> Tensor:
        """Domains that have samples, ``[D]`` bool."""
        return self.count > 0

    @property
    def shares(self) -> Tensor:
        """``[D]``: the same for each domain that is present, 0 for the others; sum 1."""
        return self.present.to(self.domain.dtype) / self.present.sum()

    @property
    def filled(self) -> Tensor:
        """`domain` with 0 for an empty domain."""
        return self.domain.where(self.present, 0)

    def statistics(self) -> dict[str, Tensor]:
        return {"loss": self.mean, "domain_loss": self.domain, "domain_count": self.count}

    def weights(self, coefficients: Tensor, staged: Sequence[Batch]) -> list[Tensor]:
        """Weights of the samples with which their sum is that of the domains' means."""
        each = coefficients / self.count.clamp(min=1).to(coefficients.dtype)
        return [each[batch.partition.domains] for batch in staged]

    def objective(self, coefficients: Tensor, staged: Sequence[Batch]) -> Tensor:
        r""":math:`\sum_d c_d \ell_d`, this rank's part of it, with its graph."""
        parts = zip(self.weights(coefficients, staged), staged, strict=True)
        return torch.stack([(accumulated(b.losses) * w).sum() for w, b in parts]).sum()


def check_reached(groups: Iterable[dict[str, Any]], name: str) -> None:
    """Raise if a backward has left no parameter a gradient."""
    parameters = [p for group in groups for p in group["params"]]
    if all(p.grad is None for p in parameters):
        if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
            return  # which may have used and cleared it
        raise RuntimeError(
            f"losses: {name}.backward reached none of the optimizer's parameters; compute the "
            "losses from the model that the optimizer was made for"
        )


def refuse_again(losses: Tensor, staged: Iterable[Batch], name: str) -> None:
    """Raise if these very losses were staged already; other uses of a graph are autograd's."""
    if any(batch.losses is losses for batch in staged):
        raise RuntimeError(
            f"{name}.backward was already called on these losses with final=False; pass the next "
            "micro-batch's"
        )


class Plain(DomainOptimizer):
    """Base of wrappers that need no gradients of single samples or domains.

    One ordinary backward: whatever autograd can differentiate goes, at its own price.
    """

    looks_at_samples = False

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None) -> Batch:
        refuse_again(losses, self._staged, type(self).__name__)
        return Batch(
            losses, partition(domains, losses, self.num_domains), UNSEEN, terms, self._scale
        )


class MeanLoss(Plain):
    """One plain backward of the mean loss, and of the mean of what terms add."""

    def _gradient(self, staged: Sequence[Batch]) -> Tensor:
        descend(total_loss(staged) / self._whole.samples, staged, self._whole)
        check_reached(self.param_groups, type(self).__name__)
        losses = Losses.of(staged, self._whole)
        self._statistics = losses.statistics()
        return losses.mean


class Weighted(Plain):
    r"""Base of algorithms with the gradient :math:`\sum_d c_d \nabla\ell_d` of domain mean losses.

    An algorithm implements `_coefficients`.
    """

    def _gradient(self, staged: Sequence[Batch]) -> Tensor:
        losses = Losses.of(staged, self._whole, self._domains())
        coefficients, more = self._coefficients(losses)
        weights = losses.weights(coefficients, staged)
        parts = [batch.losses for batch in staged]
        terms, shares = shared_terms(staged, self._whole)
        grads = [scaled(w, staged).to(x.dtype) for w, x in zip(weights, parts, strict=True)]
        self._whole.backward([*parts, *terms], [*grads, *shares])
        check_reached(self.param_groups, type(self).__name__)
        self._statistics = {**losses.statistics(), **more}
        return losses.mean

    def _owner(self) -> Tensor:
        """The parameter with whose state that is kept which belongs to none: the first that is
        trained, so that the wrapped optimizer has an entry for it, too."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return next((p for p in parameters if p.grad is not None), parameters[0])

    def _domains(self) -> int:
        """How many domains the algorithm knows of already."""
        return 0

    @abstractmethod
    def _coefficients(self, losses: Losses) -> tuple[Tensor, dict[str, Tensor]]:
        """The weights c ``[D]`` of the domains' mean losses, and further statistics."""
