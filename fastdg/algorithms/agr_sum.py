"""Agr-Sum: step where the domains' gradients agree in sign."""

from __future__ import annotations

from typing import Literal

from ..core.combine.combiner import Combined, DomainGradients, GradientCombiner
from ..core.hyper import check_reduction, hyper


class AgrSum(GradientCombiner):
    r"""Agreement: the domains' mean gradient where all of them have the same sign, else 0.

    .. math::
        \text{grad}_k = 1\Big[\big|\textstyle\sum_d \operatorname{sign} g_{dk}\big| = D\Big]
        \cdot \tfrac1D \textstyle\sum_d g_{dk}

    The sign of 0 is 0: a domain without a gradient at a place disagrees there. Where nothing agrees
    the gradient is 0. One domain alone has the plain gradient.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        reduction: ``"mean"`` over the domains, or ``"sum"``, the paper's scale.
        num_domains: D; default: as many as the batch has. A domain without samples in a batch
            takes no part in it.
        model: gives parameters their names in messages.
        check: has no effect any more.

    ``reduction`` lives in ``param_groups[0]`` as ``agrsum_reduction``. For batch norm in training
    mode run a forward for each domain: `fastdg.core.combine.combiner.GradientCombiner`.

    ``statistics`` holds ``loss``, ``agreeing`` (share of all entries; 0-dim),
    ``agreeing_by_parameter`` (in the order of ``opt.parameter_names``; NaN for one not used),
    ``domain_loss`` (``[D]``, NaN for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Mansilla, Echeveste, Milone, Ferrante: Domain Generalization via Gradient Surgery,
        ICCV 2021.

    Example:
        >>> opt = fastdg.AgrSum(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "agrsum"

    reduction: Literal["mean", "sum"] = hyper("mean", check_reduction)

    def combine(self, gradients: DomainGradients) -> Combined:
        return gradients.agreement(self.reduction).combined
