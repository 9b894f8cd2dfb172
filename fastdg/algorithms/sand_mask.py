"""SAND-mask: step where the domains' gradients agree in sign and vary little."""

from __future__ import annotations

from ..core.combine.combiner import Combined, DomainGradients, GradientCombiner
from ..core.hyper import check_share, check_steepness, hyper
from ..warn import warn_user
from .and_mask import rescaled


class SANDMask(GradientCombiner):
    r"""Mean gradient, the more the domains agree in its sign and the less they vary.

    .. math::
        m = \max\Big(0, \tanh\big(\tfrac{\kappa}{v} (|s| - \tau)\big)\Big), \qquad
        \text{grad} = \frac{m}{10^{-10} + \overline m} \cdot \tfrac1D\sum_d g_d

    with s the mean of the signs and v the unbiased variance of :math:`g_d` over the domains, and
    :math:`\overline m` the mean over each parameter tensor, as in DomainBed. With its default
    threshold 1 the mask is 0 everywhere and the weights never move; the first backward warns of it.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        threshold: :math:`\tau` in [0, 1].
        steepness: :math:`\kappa` > 0; the default is DomainBed's.
        num_domains, model, check: as in `ANDMask`.

    ``threshold`` and ``steepness`` live in ``param_groups[0]`` as ``sandmask_threshold`` and
    ``sandmask_steepness``. ``statistics`` and the rest as in `ANDMask`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Shahtalebi, Gagnon-Audet, Laleh, Faramarzi, Ahuja, Rish: SAND-mask: An Enhanced Gradient
        Masking Strategy for the Discovery of Invariances in Domain Generalization, 2021.
    """

    prefix = "sandmask"

    threshold: float = hyper(1.0, check_share)
    steepness: float = hyper(10.0, check_steepness)
    _warned = False

    def combine(self, gradients: DomainGradients) -> Combined:
        if self.threshold == 1 and not self._warned:
            self._warned = True
            warn_user(
                "threshold: with 1 the mask of SANDMask is 0 everywhere, so no weights move. "
                "Use a threshold below 1 (DomainBed searches 0 to 1).",
            )
        return rescaled(gradients.agreement("mean", self.threshold, self.steepness), gradients)
