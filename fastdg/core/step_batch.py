"""One step as an objective sees it: all micro-batches of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._torch import has_graph
from ..distributed.global_batch import GlobalBatch
from ..domains import group_sums
from ..dtypes import to_statistics_dtype
from ..statistics.api import moments_of
from ..statistics.moments import DomainMoments, merge, pad_rows
from .backward import accumulate, backward, scaled
from .batch import Batch, domain_sums, known_sums, total_loss


class StepRecord(NamedTuple):
    """A step after its backward, detached: the argument of `after_step`.

    Attributes:
        loss, counts, present: as in `StepBatch`.
        domain_means: mean loss of each domain ``[D]``; NaN for a domain without samples.
        mean, variance: as in `DomainMoments`, if the objective asked for them.
    """

    loss: Tensor
    domain_means: Tensor
    counts: Tensor
    present: Tensor
    mean: dict[str, Tensor]
    variance: dict[str, Tensor]

    @property
    def domain_losses(self) -> Tensor:
        """As in `StepBatch`."""
        return self.domain_means.where(self.present, 0)


class StepBatch:
    """Micro-batches of all ranks in one step, from which an objective is computed.

    Args:
        parts: this rank's micro-batches.
        whole: batch of all ranks.
        domains: least number D of domains, as own state may have more than the batch.
        first: whether this is the first step of a run.
        params: selection of the parameters with per-sample gradients.

    Attributes:
        loss: mean of all samples' losses, 0-dim, differentiable.
        domain_losses: mean loss of each domain ``[D]``, differentiable; 0 for a domain without
            samples, which `domain_mean` and `shares` exclude.
        counts: samples of each domain ``[D]``, int64.
        present: whether each domain has samples ``[D]``, bool.
        parts: this rank's micro-batches.
    """

    def __init__(
        self, parts: Sequence[Batch], whole: GlobalBatch, domains: int, first: bool, params: object
    ) -> None:
        self.parts, self.whole = parts, whole
        self.counts = pad_rows(whole.count, max(domains, len(whole.count)))
        self.present = self.counts > 0
        D = self.counts.shape[0]
        self._sums: Tensor | None = None  # of the losses of each domain, with their graph
        known = known_sums(parts, D) if whole.alone else None
        if known is not None and len(parts) == 1:
            self.loss = to_statistics_dtype(parts[0].losses).mean()
        else:
            own = total_loss(parts)
            if known is None:
                own, self._sums = whole.total([own, domain_sums(parts, D)])
                known = self._sums.detach()
            self.loss = own / whole.samples
        self.statistics = {
            "loss": self.loss.detach(),
            "domain_loss": known / self.counts,
            "domain_count": self.counts,
        }
        self._moments: DomainMoments | None = None
        self._first, self._params = first, params
        # Gradients of other tensors, from the moments' backward
        self._others: dict[Tensor, Tensor] | None = None
        self._in_grad = False  # whether the moments' backward has added to `.grad`

    # -- over domains and samples --

    @cached_property
    def domain_losses(self) -> Tensor:
        """As described for the class."""
        with torch.enable_grad():  # an objective may look at them under no_grad first
            if self._sums is None:
                self._sums = domain_sums(self.parts, len(self.counts))
            return self._sums / self.counts.clamp(min=1)

    @property
    def shares(self) -> Tensor:
        """Weight of each domain ``[D]``: equal for domains with samples, else 0; sum 1."""
        return self.present.to(self.loss.dtype) / self.present.sum()

    def domain_mean(self, values: Tensor) -> Tensor:
        """Average ``values [D]`` over the domains with samples; all values must be finite."""
        return (self.shares * values).sum()

    def grouped_mean(
        self, values: Sequence[Tensor], groups: Sequence[Tensor], num_groups: int
    ) -> Tensor:
        """Average per-sample values in each group ``[G]``; 0 for an empty group.

        Args:
            values: for each micro-batch ``[N]``, differentiable.
            groups: group of each sample, for each micro-batch ``[N]``.
            num_groups: G.
        """
        value, group = torch.cat([*values]), torch.cat([*groups])
        total = group_sums(value, group, num_groups)
        count = group_sums(torch.ones_like(value), group, num_groups)
        total, count = self.whole.total([total, count])
        return total / count.clamp(min=1)

    def input(self, name: str, *, differentiable: bool) -> list[Tensor]:
        """Return an input of `backward`, for each micro-batch ``[N, *]``.

        The algorithm must list the name in ``takes``.

        Args:
            name: name of the input.
            differentiable: the objective depends on it, so it must have a graph.

        Raises:
            TypeError, ValueError: a call did not pass it, or not one row for each sample, or
                without its graph.
        """
        found = [part.inputs.get(name) for part in self.parts]
        for value, part in zip(found, self.parts, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name}: expected a tensor (N, *), got {type(value).__name__}. Call "
                    f"opt.backward(losses, domains, {name}={name})."
                )
            if value.dim() == 0 or len(value) != len(part.losses):
                raise ValueError(
                    f"{name}: expected one row for each of {len(part.losses)} losses, got shape "
                    f"{tuple(value.shape)}."
                )
            if differentiable and not has_graph(value):
                raise ValueError(
                    f"{name}: expected a tensor with its graph, got one without. Pass the tensor "
                    "of the forward, outside torch.no_grad and without detach."
                )
        return found  # type: ignore[return-value]

    def gathered(self, values: Sequence[Tensor]) -> Tensor:
        """Concatenate per-sample values of all micro-batches and ranks ``[N, *]``; differentiable.

        Args:
            values: for each micro-batch ``[n, *]``, differentiable.
        """
        own = to_statistics_dtype(torch.cat([*values]))
        if self.whole.ranks.size == 1:
            return own
        sizes = self.whole.counts.sum(1).tolist()
        rank = self.whole.ranks.rank
        pieces = [
            own if r == rank else own.new_zeros(n, *own.shape[1:]) for r, n in enumerate(sizes)
        ]
        return self.whole.total([torch.cat(pieces)])[0]

    @property
    def membership(self) -> Tensor:
        """Whether each sample of `gathered` belongs to each domain ``[D, N]``, as 0 and 1."""
        own = torch.cat([part.partition.domains for part in self.parts])
        rows = own.unsqueeze(1) == torch.arange(len(self.counts), device=own.device)
        return self.gathered([rows.to(self.loss.dtype)]).t()

    def places_in_domain(self) -> list[Tensor]:
        """Return the place of each sample within its domain, for each micro-batch ``[N]``.

        The samples of a rank come after the samples of lower ranks.
        """
        places: list[Tensor] = []
        before = self.whole.count_before
        for part in self.parts:
            partition = part.partition
            first = partition.offsets[partition.domains] - before[partition.domains]
            rank = torch.empty_like(partition.order)
            rank[partition.order] = torch.arange(len(rank), device=rank.device)
            places.append(rank - first)
            before[: partition.num_domains] += partition.count
        return places

    def logit_products(self, differentiable: bool) -> list[Tensor]:
        """Differentiate each loss by a factor on its logits: for each micro-batch ``[N]``.

        The algorithm must set ``looks_at_logits = True``.
        """
        found = []
        for part in self.parts:
            assert part.output is not None
            found.append(part.output.products(part.scale, differentiable))
        return found

    # -- statistics of gradients --

    def moments(
        self, *, differentiable: bool, loss_only: bool = False, ever: bool = True
    ) -> DomainMoments:
        """Compute mean and biased variance of per-sample gradients by domain, of chosen parameters.

        Args:
            differentiable: whether the objective depends on them.
            loss_only: whether the objective is `loss` alone, whose gradient may come from the same
                backward.
            ever: whether some step of the run differentiates them; the first step raises if an
                operation does not support it.
        """
        if self._moments is None:
            own = self._own_moments(differentiable, loss_only, ever)
            self._moments = self.whole.moments(own)
        return self._moments

    def means(self, *, differentiable: bool) -> dict[str, Tensor]:
        """Compute the means of `moments` without the variances, which need as much memory."""
        return self.whole.means(self._own_moments(differentiable, loss_only=False, ever=True))

    def _own_moments(self, differentiable: bool, loss_only: bool, ever: bool) -> DomainMoments:
        if self._first and ever:  # in the first step, not hours later when an anneal ends
            for part in self.parts:
                part.tracked.refuse_single_derivatives()
        head = self._params == "head"
        self._in_grad = loss_only and head and self._is_mean()
        once = loss_only and not head and self._serves_gradient()
        self._others = {} if once else None
        found: list[DomainMoments] = []
        for part in self.parts:
            others = part.tracked.other_leaves if once else []
            moments, grads = moments_of(
                part.tracked,
                part.partition,
                create_graph=differentiable,
                retain_graph=part.retain_graph or not (once or self._in_grad),
                extra=others,
                scale=part.scale,
                to_grad=self._in_grad,
            )
            found.append(moments)
            for p, grad in zip(others, grads, strict=True):
                if grad is not None and self._others is not None:
                    self._others[p] = self._others[p] + grad if p in self._others else grad
        return merge(found)

    def _serves_gradient(self) -> bool:
        """Return whether the domains' mean gradients may replace autograd's gradient.

        This needs a gradient of the losses alone, no hooks, and no sparse gradients.
        """
        looked = [part.tracked for part in self.parts]
        terms = any(part.terms is not None for part in self.parts)
        return not (terms or any(r.hooked or r.sparse for r in looked))

    def _is_mean(self) -> bool:
        """Return whether the step's backward is of the mean of one micro-batch's losses alone, and
        its way has the statistics."""
        part = self.parts[0]
        alone = len(self.parts) == 1 and self.whole.alone and not self.whole.ranks.modules.modules
        return alone and part.terms is None and part.tracked.from_mean

    # -- results --

    def penalised(self, risk: Tensor, weight: float, penalty: Tensor) -> Tensor:
        """Return ``risk + weight * penalty`` and log the sum and the penalty.

        With weight 0 it is the risk alone: 0 * inf is NaN, and no second derivative is needed.
        """
        objective = risk + weight * penalty if weight > 0 else risk
        self.log(penalty=penalty, objective=objective)
        return objective

    def log(self, **statistics: Tensor) -> None:
        """Add values to ``opt.statistics``."""
        for name, value in statistics.items():
            self.statistics[name] = value.detach() if value.requires_grad else value

    def record(self) -> StepRecord:
        """Return this step, detached."""
        moments = self._moments
        mean, variance = (moments.mean, moments.variance) if moments is not None else ({}, {})
        return StepRecord(
            self.statistics["loss"],
            self.statistics["domain_loss"],
            self.counts,
            self.present,
            _detached(mean),
            _detached(variance),
        )

    def backward(self, objective: Tensor) -> None:
        """Add the gradient of the objective (0-dim) and of the terms' mean to ``.grad``."""
        if self._in_grad:  # the moments' backward was the step's
            return
        if self._others is not None:
            self._take_means()
            return
        backward(objective, self.parts, self.whole)

    def _take_means(self) -> None:
        """Add the mean of the domains' gradients, weighted by their counts, to ``.grad``.

        It is the gradient of the mean loss, and the moments' backward has computed it already.
        """
        moments = self._moments
        assert moments is not None and self._others is not None
        named: dict[str, Tensor] = {}
        for part in self.parts:
            named |= part.tracked.chosen
        for dtype in {mean.dtype: None for mean in moments.mean.values()}:
            share = scaled(moments.count.to(dtype) / self.whole.samples, self.parts)
            names = [name for name, mean in moments.mean.items() if mean.dtype is dtype]
            owns = ops.combine_rows([moments.mean[name] for name in names], share)
            for name, own in zip(names, owns, strict=True):
                p = named[name]
                accumulate(p, own if own.shape == p.shape else own.view(p.shape))
        for p, grad in self.whole.sum_parameter_grads(self._others).items():
            accumulate(p, scaled(grad / self.whole.samples, self.parts))


def _detached(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach() if x.requires_grad else x for name, x in named.items()}
