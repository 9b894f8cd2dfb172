"""IRM: the same classifier is the best one in every domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..core.annealed import Annealed
from ..core.hyper import check_weight, hyper
from ..core.step_batch import StepBatch


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

    The logits are the input of ``F.cross_entropy`` or ``F.binary_cross_entropy_with_logits`` with
    ``reduction="none"``, found in the graph. For other losses they are the output of the head, the
    last layer with parameters; or pass them: ``opt.backward(losses, domains, logits=logits)``. Do
    so if they are scaled after the head, or if the losses are not the cross-entropy of its output
    (a warning reports it).

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        penalty_weight: w from step ``anneal_steps`` on.
        anneal_steps: steps before that, with ``pre_anneal_weight``.
        pre_anneal_weight: w before ``anneal_steps``.
        reset_base: clear the wrapped optimizer's state (moments, steps) when the anneal ends.
        num_domains: D; default: the domains seen so far. A domain without samples in a batch is
            skipped; one with a single sample has penalty 0.
        model: gives parameters their names in messages.
        check: on the first backward, and for each new head, check that the losses are the
            cross-entropy of the head's output, or that each loss depends on its own row of the
            given logits.

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
    takes: ClassVar[tuple[str, ...]] = ("logits",)
    looks_at_logits = True

    penalty_weight: float = hyper(100.0, check_weight)

    def backward(
        self,
        losses: Tensor | Sequence[Tensor],
        domains: Tensor | int | None = None,
        final: bool = True,
        logits: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """As `DomainOptimizer.backward`; ``logits`` ``[N, *]`` are the logits of ``losses``, with
        their graph."""
        return super().backward(losses, domains, final, logits=logits, **inputs)

    def objective(self, batch: StepBatch) -> Tensor:
        products, places = batch.logit_products(self.weight > 0), batch.places_in_domain()
        halves = [
            2 * part.partition.domains + place % 2
            for part, place in zip(batch.parts, places, strict=True)
        ]
        D = len(batch.counts)
        even, odd = batch.grouped_mean(products, halves, 2 * D).view(D, 2).unbind(1)
        risk = batch.domain_mean(batch.domain_losses)
        return batch.penalised(risk, self.weight, batch.domain_mean(even * odd))
