"""AND-mask: step where enough domains agree in the sign of their gradients."""

from __future__ import annotations

import torch

from ..core.combine.combiner import Agreed, Combined, DomainGradients, GradientCombiner
from ..core.hyper import check_share, hyper

TINY = 1e-10  # DomainBed's, in the division by the mean of a mask


class ANDMask(GradientCombiner):
    r"""Mean gradient where enough domains agree in its sign.

    .. math::
        m = 1\Big[\big|\tfrac1D\sum_d \operatorname{sign} g_d\big| \ge \tau\Big], \qquad
        \text{grad} = \frac{m}{10^{-10} + \overline m} \cdot \tfrac1D\sum_d g_d

    with :math:`\overline m` the mean over each parameter tensor, as in DomainBed. The sign of 0 is
    0. One domain alone has the plain gradient.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        threshold: :math:`\tau` in [0, 1]; 1, the default of DomainBed: all domains have to agree.
        num_domains: D; default: as many as the batch has. A domain without samples in a batch
            takes no part in it.
        model: gives parameters their names in messages.
        check: has no effect any more.

    ``threshold`` lives in ``param_groups[0]`` as ``andmask_threshold``. For batch norm in training
    mode run a forward for each domain: `fastdg.core.combine.combiner.GradientCombiner`.

    ``statistics`` holds ``loss``, ``agreeing`` (mean of the mask over all entries; 0-dim),
    ``agreeing_by_parameter`` (in the order of ``opt.parameter_names``; NaN for one not used),
    ``domain_loss`` (``[D]``, NaN for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Parascandolo, Neitz, Orvieto, Gresele, Schölkopf: Learning explanations that are hard to
        vary, ICLR 2021.

    Example:
        >>> opt = fastdg.ANDMask(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> losses = F.cross_entropy(model(x), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains); opt.step()
    """

    prefix = "andmask"

    threshold: float = hyper(1.0, check_share)

    def combine(self, gradients: DomainGradients) -> Combined:
        return rescaled(gradients.agreement("mean", self.threshold), gradients)


def rescaled(masked: Agreed, gradients: DomainGradients) -> Combined:
    """Scale each parameter's gradient up by the mask's mean; keep the gradient of one domain."""
    scale = torch.where(gradients.several, 1 / (TINY + masked.mean), 1)
    for grad, factor in zip(masked.combined.values(), scale, strict=True):
        grad *= factor
    return masked.combined
