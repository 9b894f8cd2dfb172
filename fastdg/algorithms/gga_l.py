"""GGA-L: noise on the gradient, the more the less the domains agree."""

from __future__ import annotations

from typing import Literal

import torch

from ..core.combine.combiner import Combined, DomainGradients, pair_cosines
from ..core.combine.seeded import RandomCombiner
from ..core.hyper import check_one_of, check_weight, hyper
from ..distributed.sharding import own_part
from ..domains import to_device_async


class GGAL(RandomCombiner):
    r"""Gradient-guided annealing by Langevin-like steps: noise of a size that the domains'
    disagreement decides.

    .. math::
        \text{grad} = \frac1N\sum_i\nabla\ell_i + \gamma\,(1 - s)\,\xi, \qquad
        s = \frac{2}{D(D-1)}\sum_{d<e}\cos(g_d, g_e)

    with one number :math:`\xi` for each entry of all parameters. A gradient of zeros has the cosine
    0. A batch of one domain has the plain gradient.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure.
        gamma: :math:`\gamma`. The noise does not shrink with the gradients: the right value depends
            on their size, unless the wrapped optimizer divides by it, as Adam does. Default: the
            authors', who use it with Adam.
        noise: ``"normal"``, the standard normal distribution of the authors' code, or
            ``"uniform"``, the :math:`\mathcal U(0, 1)` of their algorithm's listing, whose mean is
            not 0. (The listing also sums over both orders of each pair; code and this do not.)
        generator: where the noise comes from; on the device of the parameters, or it costs a copy.
            Its state is kept in ``state_dict`` and restored by loading. Default: torch's own.
        num_domains, model, check: as in `AgrSum`.

    Noise of every parameter's full size is drawn, in the order of ``opt.parameter_names``.
    ``statistics`` as in `GramSurgery`, with ``similarity`` s and ``sigma``, :math:`\gamma(1 - s)`
    (0-dim).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Ballas, Diou: Gradient-Guided Annealing for Domain Generalization, CVPR 2025,
        arXiv:2502.20162, supplement.
    """

    prefix = "ggal"

    gamma: float = hyper(0.001, check_weight)
    noise: Literal["normal", "uniform"] = hyper("normal", check_one_of("normal", "uniform"))

    def combine(self, gradients: DomainGradients) -> Combined:
        cosine, pairs = pair_cosines(gradients)
        similarity = (cosine * pairs).sum() / pairs.sum().clamp(min=1)
        sigma = self.gamma * (1 - similarity) * gradients.several
        count = gradients.count.to(cosine.dtype)
        combined = gradients.weighted_sum(count / count.sum())
        device = self.device_of(combined)
        generator = self.generator_on(device)
        draw = torch.randn if self.noise == "normal" else torch.rand
        for p in [p for p in gradients.names if p in combined]:
            grad = combined[p]
            noise = draw(p.shape, generator=generator, dtype=grad.dtype, device=device)
            noise = to_device_async(own_part(p, noise), grad.device)
            combined[p] = grad + noise * sigma.to(grad.dtype)
        gradients.log(similarity=similarity, sigma=sigma)
        return combined
