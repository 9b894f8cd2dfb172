"""IRM: the same classifier is the best one in every domain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import errors
from ..core.annealed import Annealed
from ..core.batch import Batch
from ..core.hyper import check_weight, hyper
from ..core.nesting import terms_of
from ..core.optimizer import UNSEEN, Closure
from ..core.step_batch import StepBatch
from ..domains import partition, tracing
from ..dtypes import to_statistics_dtype
from ..gradients.heads import Head, crossed_output, last_output
from ..gradients.scale import root
from ..statistics.check import TOLERANCE
from ..warn import warn_user


@dataclass
class Scored(Batch):
    """A micro-batch, and the logits that its losses were made from: as the user gave them, or what
    the cross-entropy was taken of, or else the result of the head, whose parameters have names."""

    logits: Tensor | None
    head: Head | None
    names: tuple[str, ...] = ()


class IRM(Annealed):
    r"""Invariant risk minimisation: ``objective = mean of the domains' losses + w * penalty``.

    .. math::
        c_i = \frac{\partial \ell_i(s\,z_i)}{\partial s}\Big|_{s=1}
            = \Bigl\langle\frac{\partial\ell_i}{\partial z_i}, z_i\Bigr\rangle, \qquad
        \text{penalty} = \tfrac1D\sum_d
            \operatorname{mean}_{i\in d,\ \text{even}} c_i \cdot
            \operatorname{mean}_{i\in d,\ \text{odd}} c_i

    with z the logits. Even and odd are places among the batch's samples of one domain: the product
    of two halves estimates the squared gradient without bias, and may be negative. The defaults
    are DomainBed's. The authors' own code squares the mean of all :math:`c_i`: for that give each
    sample twice, ``repeat_interleave(2)`` of logits, losses and domains.

    The logits are those that the graph has of ``F.cross_entropy`` or
    ``F.binary_cross_entropy_with_logits`` with ``reduction="none"``. Of other losses they are the
    result of the head, the last layer with parameters; or they are given:
    ``opt.backward(losses, domains, logits=logits)``. Give them if they are scaled after the head,
    or if the losses are no cross-entropy (of that result, a warning says so).

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        penalty_weight: w from step ``anneal_steps`` on.
        anneal_steps: steps before that, with ``pre_anneal_weight``.
        pre_anneal_weight: w before ``anneal_steps``.
        reset_base: clear the wrapped optimizer's state (moments, steps) when the anneal ends.
        num_domains: D; default: as many as have been seen. A domain without samples in a batch
            takes no part in it; one with a single sample has penalty 0.
        model: its parameters' names are those of messages.
        check: on the first backward, and where another layer is the head, see that the losses are
            the cross-entropy of what the head returned; or that each depends on its own row of the
            logits given.

    The settings from ``penalty_weight`` to ``reset_base`` live in ``param_groups[0]`` (as
    ``irm_penalty_weight`` and so on). ``statistics`` holds ``loss``, ``penalty``, ``objective``
    (0-dim), ``domain_loss`` (``[D]``, NaN for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Arjovsky, Bottou, Gulrajani, Lopez-Paz: Invariant Risk Minimization, 2019.

    Example:
        >>> opt = fastdg.IRM(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "irm"
    params = "head"

    penalty_weight: float = hyper(100.0, check_weight)

    _transient = (*Annealed._transient, "_checked", "_logits")

    def _start(self) -> None:
        self._logits: Tensor | None = None  # those of the `backward` that is running
        self._checked: set[tuple[str, ...]] = set()

    def backward(
        self,
        losses: Tensor,
        domains: Tensor | int | None = None,
        final: bool = True,
        logits: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """As `DomainOptimizer.backward`; ``logits`` ``[N, *]`` are those of ``losses``, with their
        graph."""
        self._logits = logits
        if any("logits" in term.inputs() for term in terms_of(self)):
            inputs["logits"] = logits
        try:
            return super().backward(losses, domains, final, **inputs)
        finally:
            self._logits = None

    def _evaluate(self, closure: Closure) -> Tensor:
        result = closure()
        if isinstance(result, tuple) and len(result) == 3 and not isinstance(result[2], dict):
            losses, domains, logits = result
            return self.backward(losses, domains, logits=logits)
        return super()._evaluate(lambda: result)

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None) -> Scored:
        head = None if self._logits is not None else crossed_output(losses)
        if self._logits is not None or head is not None:
            if self._logits is not None:
                check_logits(self._logits, losses)
            errors.refuse_again(losses, self._micro_batches, type(self).__name__)
            parts = partition(domains, losses, self.num_domains)
            return Scored(losses, parts, UNSEEN, terms, self._scale, self._logits, head)
        resolved = self._tape.resolve(losses, warn=False)  # no gradient of a parameter is asked for
        assert resolved.forward is not None
        parts, head = partition(domains, losses, self.num_domains), last_output(resolved.forward)
        names = tuple(resolved.forward.names)
        return Scored(losses, parts, resolved, terms, self._scale, None, head, names)

    def objective(self, batch: StepBatch) -> Tensor:
        # No frame between, for the warning's place: a comprehension is one until Python 3.12
        products = [*map(partial(self._products, create_graph=self.weight > 0), batch.parts)]
        places = batch.places_in_domain()
        halves = [
            2 * part.partition.domains + place % 2
            for part, place in zip(batch.parts, places, strict=True)
        ]
        D = len(batch.counts)
        even, odd = batch.grouped_mean(products, halves, 2 * D).view(D, 2).unbind(1)
        risk = batch.domain_mean(batch.domain_losses)
        return batch.penalised(risk, self.weight, batch.domain_mean(even * odd))

    def _products(self, batch: Scored, create_graph: bool) -> Tensor:
        """The derivative of each sample's loss by a factor on its logits, ``[N]``."""
        rows = len(batch.losses), -1
        start = root(batch.losses, batch.scale)
        weights = torch.ones_like(batch.losses)
        if start is not None:
            weights *= start
        delta, logits = _deltas(batch, create_graph, weights)
        with torch.set_grad_enabled(create_graph):
            self._check(batch, delta, logits, weights)
            products = (
                (to_statistics_dtype(delta) * to_statistics_dtype(logits)).reshape(rows).sum(1)
            )
            return products if start is None else products / start

    @torch.no_grad()
    def _check(self, batch: Scored, delta: Tensor, logits: Tensor, before: Tensor) -> None:
        if batch.names in self._checked or not self.check or tracing():
            return
        if batch.head is not None:
            if batch.resolved is UNSEEN:  # of a cross-entropy itself
                return
            if not crossed(batch.losses * before, logits, delta):
                warn_user(
                    f"losses: IRM takes the result of the last layer, {list(logits.shape)}, for "
                    "the logits, but the losses are not the cross-entropy of it (are they scaled "
                    "after the head?). Pass the logits that the losses are made from: "
                    "opt.backward(losses, domains, logits=logits)"
                )
            self._checked.add(batch.names)
            return
        generator = torch.Generator("cpu").manual_seed(0)  # the user's stream is not touched
        weights = (0.5 + torch.rand(len(batch.losses), generator=generator)).to(batch.losses)
        weighted = _deltas(batch, False, before * weights)[0].flatten()
        expected = (delta.reshape(len(weights), -1) * weights.unsqueeze(1).to(delta)).flatten()
        tolerance = max(TOLERANCE.get(x.dtype, 1e-4) for x in (delta, batch.losses))
        if (weighted - expected).norm() > tolerance * expected.norm():
            raise RuntimeError(
                "losses: a sample's loss depends on other rows of the logits than its own (a loss "
                "over pairs, or the sample is not the first dimension), so a factor on one "
                "sample's logits cannot be told from that on another's"
            )
        if len(weights) > 1 and 0 < float(expected.norm()) < float("inf"):
            self._checked.add(batch.names)

    def _clear(self) -> None:
        super()._clear()
        self._checked, self._logits = set(), None


def check_logits(logits: Any, losses: Tensor) -> None:
    """Raise unless ``logits`` is a tensor with a graph and a row for each of ``losses``."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor (N, *), got {type(logits).__name__}")
    if logits.shape[:1] != losses.shape:
        raise ValueError(
            f"logits: expected a row for each of the {len(losses)} losses, got shape "
            f"{tuple(logits.shape)}"
        )
    if not logits.requires_grad:
        raise ValueError("logits: they have no graph; pass the very tensor losses were made from")


def crossed(losses: Tensor, logits: Tensor, delta: Tensor) -> bool:
    r"""Whether the losses can be the cross-entropy of the logits, with any weight and label a
    sample: :math:`\ell = -w\log p_y` where :math:`\partial\ell/\partial z = w(p - e_y)`.

    Args:
        losses: ``[N]``.
        logits: ``[N, C]``; ``[N]`` and ``[N, 1]`` are of two classes. Of more dimensions nothing is
            known.
        delta: the gradients of the losses at the logits.
    """
    if logits[0].numel() == 1:
        z, g = (x.reshape(-1, 1).double() for x in (logits, delta))
        z, g = torch.cat([torch.zeros_like(z), z], 1), torch.cat([-g, g], 1)
    elif logits.dim() == 2:
        z, g = logits.double(), delta.double()
    else:
        return True
    logs = z.log_softmax(1)
    y = g.argmin(1, keepdim=True)
    rest = 1 - logs.gather(1, y).exp()
    weight = -g.gather(1, y) / rest
    expected = (-weight * logs.gather(1, y)).squeeze(1)
    # Near 1 nothing is left of p_y in half precision
    told = (rest.squeeze(1) > 0.1) & expected.isfinite() & losses.isfinite()
    off = (losses.double() - expected).abs() > 0.1 * expected.abs() + 1e-6
    return not (told & off).any()


def _deltas(batch: Scored, create_graph: bool, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the weighted losses at the logits, and these; the graph is kept."""
    at: Any = batch.head.edge if batch.head is not None else batch.logits
    (delta,) = torch.autograd.grad(
        batch.losses,
        [at],
        weights,
        create_graph=create_graph,
        retain_graph=True,
        allow_unused=True,
    )
    if delta is None:
        raise ValueError("logits: losses do not depend on them; pass what losses were made of")
    if batch.head is not None:
        return batch.head.rows(delta), batch.head.rows(batch.head.value)
    assert batch.logits is not None
    return delta, batch.logits
