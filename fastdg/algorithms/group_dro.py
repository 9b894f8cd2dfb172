"""GroupDRO: the worst domain counts most."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.declared_state import DOMAINS, STEP_FIRST, PerRun
from ..core.hyper import check_weight, hyper
from ..core.optimizer import DomainOptimizer
from ..core.step_batch import StepBatch, StepRecord


class GroupDRO(DomainOptimizer):
    r"""The worst domain counts most: ``objective = sum of weights * losses of the domains``.

    .. math::
        q_d \leftarrow q_d\,e^{\eta\ell_d} \Big/ \sum_e q_e\,e^{\eta\ell_e}, \qquad
        \text{objective} = \sum_d q_d\,\ell_d, \qquad
        \ell_d = \tfrac1{n_d}\sum_{i\in d}\ell_i

    q starts equal, is a constant to the gradient, moves in `step` and is kept in ``state_dict``
    (float64). The defaults are DomainBed's.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        eta: the step size :math:`\eta` of q; lives in ``param_groups[0]`` as ``groupdro_eta``.
        num_domains: D; default: the domains seen so far. A domain without samples in a batch keeps
            its q, and the others share the rest; the objective is the mean over the domains with
            samples. A new domain starts with the mean q.
        model: its parameters' names are used in messages.

    ``statistics`` holds ``loss``, ``objective`` (0-dim), ``weights`` (``[D]``, in the objective, 0
    for an empty domain), ``domain_loss`` (``[D]``, NaN for an empty domain) and ``domain_count``
    (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Sagawa, Koh, Hashimoto, Liang: Distributionally Robust Neural Networks for Group Shifts,
        ICLR 2020.

    Example:
        >>> opt = fastdg.GroupDRO(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "groupdro"
    compares = True
    looks_at_samples = False

    eta: float = hyper(0.01, check_weight)

    q = PerRun(
        "q",
        "weights of the domains",
        rows=DOMAINS,
        begin=lambda opt: equal(opt.num_domains, opt._owner().device) if opt.num_domains else None,
        way=f"give num_domains=, or {STEP_FIRST}",
    )

    def objective(self, batch: StepBatch) -> Tensor:
        grown = self._grown(batch.domain_losses.detach(), batch.counts)
        weights = (grown / grown.sum()).to(batch.domain_losses.dtype)
        objective = (weights * batch.domain_losses).sum()
        batch.log(objective=objective, weights=weights)
        return objective

    def after_step(self, record: StepRecord) -> None:
        q = self._spread(record.counts)
        grown = self._grown(record.domain_losses, record.counts)
        share = q.where(record.present, 0).sum()
        self.q = torch.where(record.present, grown / grown.sum() * share, q)

    def _grown(self, losses: Tensor, counts: Tensor) -> Tensor:
        """``q_d exp(eta loss_d)``, up to one factor; 0 for an empty domain."""
        exponents = (self.eta * losses.double()).where(counts > 0, -torch.inf)
        # One exponent may be subtracted from all, and then none overflows
        return self._spread(counts) * (exponents - exponents.max()).exp()

    def _spread(self, count: Tensor) -> Tensor:
        """q ``[D]``, made or extended where there are domains that were not seen before."""
        q = self.q
        if q is None:
            return equal(len(count), count.device)
        if len(q) < len(count):
            q = torch.cat([q, q.mean().expand(len(count) - len(q))])
            q = q / q.sum()
        # A weight of 0 could never grow again
        return q.clamp(min=torch.finfo(q.dtype).tiny)


def equal(domains: int, device: torch.device) -> Tensor:
    """q of a new run."""
    return torch.full((domains,), 1 / domains, dtype=torch.float64, device=device)
