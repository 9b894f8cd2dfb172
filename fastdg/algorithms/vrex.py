"""VREx: the same risk in every domain."""

from __future__ import annotations

from torch import Tensor

from ..core.annealed import Annealed
from ..core.hyper import check_weight, hyper
from ..core.step_batch import StepBatch


class VREx(Annealed):
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
    looks_at_samples = False

    penalty_weight: float = hyper(10.0, check_weight)

    def objective(self, batch: StepBatch) -> Tensor:
        risk = batch.domain_mean(batch.domain_losses)
        penalty = batch.domain_mean((batch.domain_losses - risk).square())
        return batch.penalised(risk, self.weight, penalty)
