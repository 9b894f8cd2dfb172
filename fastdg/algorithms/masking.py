"""AND-mask and SAND-mask: step where the domains' gradients agree in sign."""

from __future__ import annotations

import torch

from ..core.domain_gradients import Combined, DomainGradientOptimizer, Masked, Statistics
from ..core.gathering import Gradients
from ..core.hyper import check_share, check_steepness, hyper
from ..warn import warn_user

TINY = 1e-10  # DomainBed's, in the division by the mean of a mask


class _MaskOptimizer(DomainGradientOptimizer):
    """The masked mean gradient, scaled up for what the mask takes away from each parameter."""

    threshold: float = hyper(1.0, check_share)

    def _rescaled(self, masked: Masked, gradients: Gradients) -> tuple[Combined, Statistics]:
        # One domain's gradient stays as it is
        scale = torch.where(gradients.several, 1 / (TINY + masked.mean), 1)
        for grad, factor in zip(masked.combined.values(), scale, strict=True):
            grad *= factor
        return masked.combined, masked.statistics


class ANDMask(_MaskOptimizer):
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
        model: its parameters' names are those of messages.
        check: has no effect any more.

    ``threshold`` lives in ``param_groups[0]`` as ``andmask_threshold``. For batch norm in training
    mode run a forward for each domain: `fastdg.core.domain_gradients.DomainGradientOptimizer`.

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

    def _surgery(self, gradients: Gradients) -> tuple[Combined, Statistics]:
        return self._rescaled(self._masked(gradients, "mean", self.threshold), gradients)


class SANDMask(_MaskOptimizer):
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

    steepness: float = hyper(10.0, check_steepness)
    _warned = False

    def _surgery(self, gradients: Gradients) -> tuple[Combined, Statistics]:
        if self.threshold == 1 and not self._warned:
            self._warned = True
            warn_user(
                "SANDMask: with threshold=1 its mask is 0 everywhere, so the weights never move; "
                "use a threshold below 1 (DomainBed's search draws it from 0 to 1)",
            )
        masked = self._masked(gradients, "mean", self.threshold, self.steepness)
        return self._rescaled(masked, gradients)
