"""Algorithms that combine the domains' gradients into one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...distributed.global_batch import GlobalBatch
from ...distributed.sharding import local
from ...domains import Partition, partition, readable, to_device_async
from ...gradients.tape import TrackedForward
from ...statistics.moments import pad_rows
from ..backward import accumulate_with_hooks, scaled
from ..optimizer import DomainOptimizer
from .exchanged import DistributedGradients
from .gathering import (
    AccumulatedGradients,
    DomainBatch,
    Gradients,
    SingleBackward,
    scatter_rows,
)

Combined = dict[Tensor, Tensor]  # parameter -> gradient of the step


class Agreed(NamedTuple):
    """Sum of the domains' gradients where their signs agree.

    Attributes:
        combined: weighted sum times the mask, for each parameter.
        mean: mean of the mask for each parameter ``[P]``.
        size: mean of ``combined.abs()`` over all entries that agree, 0-dim; 0 if none does.
    """

    combined: Combined
    mean: Tensor
    size: Tensor


class DomainGradients:
    """Gradient of each domain's mean loss, for all parameters; never all in memory at once.

    Args:
        source: computes the gradients.
        names: names of the optimizer's parameters, in its order.
        sizes: parameters, and a tensor with the wanted dtype and device -> their ``numel``.

    Attributes:
        count: samples of each of the E domains ``[E]``. These are the domains with samples if the
            CPU knows them without a wait, else all D.
    """

    def __init__(
        self,
        source: Gradients,
        names: Mapping[Tensor, str],
        sizes: Callable[[list[Tensor], Tensor], Tensor],
    ) -> None:
        self.source, self.names, self.sizes = source, names, sizes
        self.count, self.ids, self.extent = source.count, source.ids, source.extent
        self.statistics: dict[str, Tensor] = {}
        self._gram: Tensor | None = None
        self._used = ""  # name of the method that has freed the gradients or their graph

    @property
    def several(self) -> Tensor:
        """Whether more than one domain has samples, 0-dim bool."""
        return self.source.several

    def domain_weights(self, reduction: str) -> Tensor:
        """Return weights ``[E]`` of a ``"mean"`` or ``"sum"`` over the domains with samples."""
        return self.source.weights(reduction)

    def _use(self, name: str) -> None:
        if self._used:
            raise RuntimeError(
                f"combine: {name}() was called after {self._used}(), which frees the gradients. "
                "Call gram() and one weighted_sum(), or one agreement()."
            )

    def gram(self) -> Tensor:
        """Compute inner products over all parameters ``[E, E]``."""
        if self._gram is None:
            self._use("gram")
            self._gram = self.source.gram()
        return self._gram

    def weighted_sum(self, weights: Tensor) -> Combined:
        """Sum the domains' gradients times ``weights`` ``[E]``; may be called once."""
        self._use("weighted_sum")
        gram, scatter = self.gram(), self.source.scatter_rows
        self._used = "weighted_sum"
        norm = gram.diagonal().sqrt()

        def matrix(values: Tensor, fill: float) -> Tensor:
            return scatter(scatter(values, fill).t(), fill).t()

        self.log(
            gram=matrix(gram, 0),
            cosine=matrix(gram / norm / norm.unsqueeze(1), torch.nan),
            conflicts=(gram < 0).sum() // 2,  # no square on the diagonal is negative
            weights=scatter(weights.detach(), 0),
        )
        return self.source.combined(weights)

    def agreement(
        self, reduction: str, threshold: float = 1.0, steepness: float = torch.inf
    ) -> Agreed:
        """Apply `fastdg.ops.agreement` to all parameters; may be called once.

        The gradient of one domain alone agrees everywhere.
        """
        self._used = self._used or ("gram" if self._gram is not None else "")
        self._use("agreement")
        self._used = "agreement"
        if len(self.ids) == 1:
            threshold, steepness = 0.0, torch.inf
        found = self.source.agreement(self.domain_weights(reduction), threshold, steepness)
        order = [p for p in self.names if p in found]
        sums = [getattr(found[p], name) for name in ("agreeing", "magnitude") for p in order]
        both = torch.stack(sums).to(self.source.losses.dtype).view(2, -1)
        agreeing, _ = both.unbind()
        agree, magnitude = both.sum(1).unbind()
        numel = self.sizes(order, agreeing)
        mean = agreeing / numel
        places = [i for i, p in enumerate(self.names) if p in found]
        self.log(
            agreeing=agree / numel.sum(),
            agreeing_by_parameter=scatter_rows(mean, places, len(self.names), torch.nan),
        )
        size = magnitude / agree.clamp(min=1)
        return Agreed({p: found[p].combined for p in order}, mean, size)

    def log(self, **statistics: Tensor) -> None:
        """Add values to ``opt.statistics``."""
        self.statistics.update(statistics)


class GradientCombiner(DomainOptimizer):
    r"""Base of the algorithms that combine the domains' gradients
    :math:`g_d = \frac1{n_d}\sum_{i\in d}\nabla\ell_i` of all parameters of the optimizer into one.

    A mixed batch takes one backward. With ``final=False`` the gradients of a micro-batch are
    computed at once and its graph is freed; the final call merges all gradients, weighted by the
    number of samples. A micro-batch of one domain costs one ordinary backward, even if the model
    mixes its samples; batch norm in training mode then uses the domain's own statistics. With ids
    on the CPU, such a micro-batch is found without a wait.

    A parameter has a gradient of zeros in a domain that does not use it, and none if no domain
    uses it. Hooks of parameters get the combined gradient. Tensors that require a gradient but are
    not in the optimizer get the gradient of the mean loss.

    Args:
        base: optimizer to wrap.
        num_domains: number of training domains D; default: the domains of the batch.
        model: gives parameters their names in messages.
        check: has no effect any more.
    """

    compares, penalises = True, False
    _way_out = (
        "run the model on each domain by itself, with backward(losses, domains, final=False) for "
        "all except the last, or freeze these parameters"
    )
    _transient = (*DomainOptimizer._transient, "_measured")

    def _clear(self) -> None:
        super()._clear()
        self._measured: tuple[list[Tensor], Tensor] = [], torch.empty(0)  # see `_sizes`

    @property
    def parameter_names(self) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        return list(self._names.values())

    @abstractmethod
    def combine(self, gradients: DomainGradients) -> Combined:
        """Return the gradient of the step: parameter -> gradient."""

    def _batch(
        self, losses: Tensor, domains: Tensor, terms: Tensor | None, **own: Any
    ) -> DomainBatch:
        total = losses if terms is None else losses + terms
        parts = partition(domains, losses, self.num_domains)
        extent = parts.num_domains

        def made(parts: Partition, tracked: TrackedForward, ids: list[int]) -> DomainBatch:
            scale = self._loss_scale.scale
            return DomainBatch(losses, parts, tracked, terms, scale, total, ids, extent)

        tracked = None
        if self.num_domains is not None and not readable(domains):
            tracked = self._tape.resolve(total, warn=False)
            if not tracked.slow:
                return made(parts, tracked, list(range(extent)))
            # One wait for the device: all samples may belong to one domain
        present, rows = torch.unique(domains.detach().long(), return_inverse=True)
        ids: list[int] = present.tolist()
        if len(ids) < extent:
            parts = partition(rows, losses, len(ids))
        if len(ids) == 1:
            return made(parts, self._tape.reached(total), ids)
        if tracked is None:
            tracked = self._tape.resolve(total, warn=False)
        self._warn_of_slow(tracked)
        return made(parts, tracked, ids)

    def _meet(self, staged: Sequence[Any]) -> GlobalBatch:
        *earlier, batch = staged
        count = scatter_rows(batch.partition.count, batch.ids, batch.extent, 0)
        samples = len(batch.losses) + sum(gathered.samples for gathered in earlier)
        for gathered in earlier:
            before = gathered.scatter_rows(gathered.count, 0)
            domains = max(len(count), len(before))
            count = pad_rows(count, domains) + pad_rows(before, domains)
        others = [p.shape for p in batch.tracked.other_leaves]
        return self._met(count, samples, lambda: others)

    def _on_micro_batch(self) -> None:
        *earlier, batch = self._micro_batches
        with torch.no_grad():
            self._micro_batches = [AccumulatedGradients.of(earlier, batch)]

    def _gradient(self, staged: Sequence[Any]) -> Tensor:
        *earlier, batch = staged
        with torch.no_grad():
            one = not earlier and not batch.alone
            own = SingleBackward(batch) if one else AccumulatedGradients.of(earlier, batch)
            several = self._ranks.size > 1
            gradients = (
                DistributedGradients(own, self._global_batch, self._names) if several else own
            )
            domains = DomainGradients(gradients, self._names, self._sizes)
            combined = self.combine(domains)
            check_combined(combined, self._names, type(self).__name__)
            for p in self._names:
                if p in combined:
                    grad = scaled(combined.pop(p), staged)
                    accumulate_with_hooks(p, grad.to_sparse(1) if p in gradients.sparse else grad)
            for p, grad in gradients.rest.items():
                accumulate_with_hooks(p, scaled(grad / gradients.samples, staged))
            loss = gradients.losses.sum() / gradients.samples
            self._statistics = {
                "loss": loss,
                "domain_loss": gradients.scatter_rows(
                    gradients.losses / gradients.count, torch.nan
                ),
                "domain_count": gradients.scatter_rows(gradients.count, 0),
                **domains.statistics,
            }
        return loss

    def _sizes(self, order: list[Tensor], like: Tensor) -> Tensor:
        """Return ``numel`` of each parameter; cached for the same parameters."""
        before, sizes = self._measured
        same = len(before) == len(order) and all(p is q for p, q in zip(before, order, strict=True))
        if not same or (sizes.dtype, sizes.device) != (like.dtype, like.device):
            made = torch.tensor([p.numel() for p in order], dtype=like.dtype, device="cpu")
            sizes = to_device_async(made, like.device)
            self._measured = order, sizes
        return sizes


def pair_cosines(gradients: DomainGradients) -> tuple[Tensor, Tensor]:
    """Return the cosines of the domains' gradients ``[E, E]``, 0 for a gradient of zeros, and 1 for
    each pair of domains with samples, in both orders, else 0, ``[E, E]``."""
    gram = gradients.gram()
    norm = gram.diagonal().sqrt()
    bound = norm * norm.unsqueeze(1)
    cosine = torch.where(bound > 0, gram / bound, 0.0)
    present = (gradients.count > 0).to(gram.dtype)
    pairs = present * present.unsqueeze(1)
    return cosine, pairs - torch.diag(pairs.diagonal())


def check_combined(combined: Any, names: Mapping[Tensor, str], name: str) -> None:
    """Raise TypeError unless ``combined`` has gradients of the optimizer's parameters."""
    expected = f"combine: {name}.combine must return parameter -> gradient, got "
    advice = ". Return gradients.weighted_sum(weights) or gradients.agreement(...).combined."
    if not isinstance(combined, dict) or not combined:
        got = "nothing" if isinstance(combined, dict) else type(combined).__name__
        raise TypeError(f"{expected}{got}{advice}")
    for p, grad in combined.items():
        if not isinstance(p, Tensor) or p not in names:
            raise TypeError(f"{expected}a key that is no parameter of the optimizer{advice}")
        if not isinstance(grad, Tensor) or grad.shape not in (p.shape, local(p).shape):
            got = f"shape {tuple(grad.shape)}" if isinstance(grad, Tensor) else type(grad).__name__
            raise TypeError(
                f"combine: {name}.combine must return a gradient of shape {tuple(p.shape)} for "
                f"{names[p]}, got {got}{advice}"
            )
