"""GroupDRO: the worst domain counts most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checkpoint import Kept
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
        num_domains: D; default: as many as have been seen. A domain without samples in a batch
            keeps its q, and the others share the rest; the objective is the mean over those
            present. A domain that was not seen before starts with the mean q.
        model: its parameters' names are used in messages.

    ``statistics`` holds ``loss``, ``objective`` (0-dim), ``weights`` (``[D]``, those of the
    objective, 0 for an empty domain), ``domain_loss`` (``[D]``, NaN for an empty domain) and
    ``domain_count`` (``[D]``).

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
    tensors = ("q",)
    compares = True
    looks_at_samples = False

    eta: float = hyper(0.01, check_weight)

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
        self._keep(torch.where(record.present, grown / grown.sum() * share, q))

    def _grown(self, losses: Tensor, counts: Tensor) -> Tensor:
        """``q_d exp(eta loss_d)``, up to one factor; 0 for an empty domain."""
        exponents = (self.eta * losses.double()).where(counts > 0, -torch.inf)
        # One exponent may be subtracted from all, and then none overflows
        return self._spread(counts) * (exponents - exponents.max()).exp()

    # -- q --

    def _known_domains(self) -> int:
        return max(map(len, self._own_state["q"].values()), default=0)

    def _spread(self, count: Tensor) -> Tensor:
        """q ``[D]``, made or extended where there are domains that were not seen before."""
        q = next(iter(self._own_state["q"].values()), None)
        if q is None:
            return torch.full(count.shape, 1 / len(count), dtype=torch.float64, device=count.device)
        if len(q) < len(count):
            q = torch.cat([q, q.mean().expand(len(count) - len(q))])
            q = q / q.sum()
        # What has come down to 0 could never grow again
        return q.clamp(min=torch.finfo(q.dtype).tiny)

    def _initial_state(self) -> Kept:
        if self.num_domains is None:
            return {}
        p = self._owner()
        equal = 1 / self.num_domains
        q = torch.full((self.num_domains,), equal, dtype=torch.float64, device=p.device)
        return {"q": {p: q}}

    def _keep(self, new: Tensor) -> None:
        kept = self._own_state["q"]
        for owner, q in kept.items() or [(self._owner(), None)]:
            if q is not None and q.shape == new.shape:
                q.copy_(new)
            else:
                kept[owner] = new

    def _validate_state(self, kept: Kept, groups: Sequence[dict[str, Any]]) -> None:
        way = "give num_domains=, or run one backward and step before loading"
        self._require_kept(kept, groups, "q", "the domains' weights", way)
        self._check_domains(kept, "q", "groupdro_q")
