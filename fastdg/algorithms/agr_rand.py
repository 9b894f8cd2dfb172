"""Agr-Rand: Agr-Sum, with noise where the domains' gradients do not agree in sign."""

from __future__ import annotations

from typing import Literal

import torch

from ..core.combine.combiner import Combined, DomainGradients
from ..core.combine.seeded import RandomCombiner
from ..core.hyper import check_reduction, hyper
from ..distributed.sharding import own_part
from ..domains import to_device_async


class AgrRand(RandomCombiner):
    r"""`AgrSum` with noise in place of the zeros.

    Where the signs do not agree the gradient is drawn from :math:`\mathcal N(0, \sigma^2)`, with
    :math:`\sigma` the mean magnitude of all entries of the network that agree, one number. Where
    nothing agrees :math:`\sigma = 0` (the paper's code gives NaN).

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        reduction: ``"mean"`` over the domains, or ``"sum"``, the paper's scale.
        generator: where the noise comes from; on the device of the parameters, or it costs a copy.
            Its state is kept in ``state_dict`` and restored by loading. Default: torch's own.
        num_domains, model, check: as in `AgrSum`.

    Noise of every parameter's full size is drawn, in the order of ``opt.parameter_names``.
    ``statistics`` as in `AgrSum`, and ``sigma`` (0-dim).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Mansilla, Echeveste, Milone, Ferrante: Domain Generalization via Gradient Surgery,
        ICCV 2021.
    """

    prefix = "agrrand"

    reduction: Literal["mean", "sum"] = hyper("mean", check_reduction)

    def combine(self, gradients: DomainGradients) -> Combined:
        agreed = gradients.agreement(self.reduction)
        sigma = agreed.size * gradients.several  # in one domain a zero is no disagreement
        device = self.device_of(agreed.combined)
        generator = self.generator_on(device)
        for p, grad in agreed.combined.items():
            noise = torch.randn(p.shape, generator=generator, dtype=grad.dtype, device=device)
            noise = to_device_async(own_part(p, noise), grad.device).mul_(sigma)
            # A sum of values of one sign is 0 only where the mask is
            agreed.combined[p] = torch.where(grad == 0, noise, grad)
        gradients.log(sigma=sigma)
        return agreed.combined
