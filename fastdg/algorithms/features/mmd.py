"""MMD: the same distribution of the features in every domain."""

from __future__ import annotations

from torch import Tensor

from .gaussians import gaussians
from .matching import FeatureMatching

GAMMAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


class MMD(FeatureMatching):
    r"""Maximum mean discrepancy: ``objective = mean of the domains' losses + w * penalty``.

    .. math::
        \text{penalty} = \frac{2}{D(D-1)}\sum_{i<j}\bigl[\bar k_{ii} + \bar k_{jj} - 2\bar k_{ij}
        \bigr], \qquad
        k(x, y) = \sum_{m=-3}^{3} \exp(-10^m \lVert x - y\rVert^2)

    :math:`\bar k_{ij}` is the mean of k over pairs of a sample of domain i and one of domain j,
    with each sample's pair with itself (DomainBed's form). The penalty costs a product
    ``[N, F] [F, N]``.

    Arguments, inputs and ``statistics`` are the same as of `CORAL`.

    Reference:
        Li, Pan, Wang, Kot: Domain Generalization with Adversarial Feature Learning, CVPR 2018,
        whose penalty this is without the adversarial part.
    """

    prefix = "mmd"

    def penalty(self, features: Tensor, membership: Tensor) -> Tensor:
        return kernel_distance(features, membership)


def kernel_distance(features: Tensor, membership: Tensor) -> Tensor:
    """Mean over pairs of domains of the squared maximum mean discrepancy, 0-dim."""
    membership = membership.double()
    count = membership.sum(1)
    share = membership / count.clamp(min=1).unsqueeze(1)
    mean = share @ gaussians(features, GAMMAS) @ share.t()  # 0 for an absent domain
    domains = (count > 0).to(count.dtype).sum()
    gaps = domains * mean.diagonal().sum() - mean.sum()
    return (2 * gaps / (domains * (domains - 1)).clamp(min=1)).to(features.dtype)
