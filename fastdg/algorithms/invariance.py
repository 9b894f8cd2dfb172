"""VREx and GroupDRO: weigh the domains by their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.annealed import Annealed
from ..core.checkpoint import Kept
from ..core.hyper import check_weight, hyper
from ..core.weighted import Losses, Weighted


class VREx(Annealed, Weighted):
    r"""Equal risks: ``objective = mean of the domains' losses + w * penalty``.

    .. math::
        \ell_d = \tfrac1{n_d}\sum_{i\in d}\ell_i, \qquad
        \text{penalty} = \tfrac1D\sum_d (\ell_d-\bar\ell)^2, \qquad
        \nabla = \tfrac1D\sum_d \bigl(1 + 2w(\ell_d-\bar\ell)\bigr)\nabla\ell_d

    One plain backward: the penalty is a weighting of the samples. The defaults are DomainBed's.
    The authors' own code takes the unbiased variance: that is w times D / (D - 1) here.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        penalty_weight: w from step ``anneal_steps`` on.
        anneal_steps: steps before that, with ``pre_anneal_weight``.
        pre_anneal_weight: w before ``anneal_steps``.
        reset_base: clear the wrapped optimizer's state (moments, steps) when the anneal ends.
        num_domains: D; default: as many as have been seen. A domain without samples in a batch
            takes no part in it.
        model: its parameters' names are used in messages.

    The settings but ``num_domains`` live in ``param_groups[0]`` (as ``vrex_penalty_weight`` and so
    on). ``statistics`` holds ``loss``, ``penalty``, ``objective`` (0-dim), ``domain_loss``
    (``[D]``, NaN for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Krueger et al.: Out-of-Distribution Generalization via Risk Extrapolation, ICML 2021.

    Example:
        >>> opt = fastdg.VREx(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "vrex"
    compares = True

    penalty_weight: float = hyper(10.0, check_weight)

    def _coefficients(self, losses: Losses) -> tuple[Tensor, dict[str, Tensor]]:
        weight = self._weight()
        shares, each = losses.shares, losses.filled
        mean = (shares * each).sum()
        penalty = (shares * (each - mean).square()).sum()
        objective, coefficients = mean, shares
        if weight > 0:  # 0 * inf is NaN
            objective = mean + weight * penalty
            coefficients = shares * (1 + 2 * weight * (each - mean))
        return coefficients, {"penalty": penalty, "objective": objective}


class GroupDRO(Weighted):
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

    eta: float = hyper(0.01, check_weight)

    def _coefficients(self, losses: Losses) -> tuple[Tensor, dict[str, Tensor]]:
        q = self._spread(losses.count)
        present, each = losses.present, losses.filled
        # One exponent may be subtracted from all, and then none overflows
        exponents = (self.eta * each.double()).where(present, -torch.inf)
        grown = q * (exponents - exponents.max()).exp()
        weights = grown / grown.sum()
        share = q.where(present, 0).sum()
        self._pending = torch.where(present, weights * share, q)
        coefficients = weights.to(each.dtype)
        objective = (coefficients * each).sum()
        return coefficients, {"objective": objective, "weights": coefficients}

    def _domains(self) -> int:
        return max(map(len, self._kept["q"].values()), default=0)

    def _spread(self, count: Tensor) -> Tensor:
        """q ``[D]``, made or extended where there are domains that were not seen before."""
        q = next(iter(self._kept["q"].values()), None)
        if q is None:
            return torch.full(count.shape, 1 / len(count), dtype=torch.float64, device=count.device)
        if len(q) < len(count):
            q = torch.cat([q, q.mean().expand(len(count) - len(q))])
            q = q / q.sum()
        # What has come down to 0 could never grow again
        return q.clamp(min=torch.finfo(q.dtype).tiny)

    def _new(self) -> Kept:
        if self.num_domains is None:
            return {}
        p = self._owner()
        equal = 1 / self.num_domains
        q = torch.full((self.num_domains,), equal, dtype=torch.float64, device=p.device)
        return {"q": {p: q}}

    def _commit(self) -> None:
        kept = self._kept["q"]
        for owner, q in kept.items() or [(self._owner(), None)]:
            if q is not None and q.shape == self._pending.shape:
                q.copy_(self._pending)
            else:
                kept[owner] = self._pending

    def _admit(
        self, kept: dict[str, dict[Tensor, Tensor]], groups: Sequence[dict[str, Any]]
    ) -> None:
        steps = groups[0].get("groupdro_steps", 0)
        if steps and not kept["q"]:
            raise ValueError(
                f"state_dict: it comes from a GroupDRO run of {steps} steps but has no groupdro_q, "
                "so the domains' weights would silently start anew. torch.distributed.checkpoint "
                "fills in only what the optimizer already has: give num_domains=, or run one "
                "backward and step before loading"
            )
        for q in kept["q"].values():
            if self.num_domains is not None and len(q) != self.num_domains:
                raise ValueError(
                    f"state_dict: its groupdro_q has {len(q)} domains, but num_domains is "
                    f"{self.num_domains}"
                )
