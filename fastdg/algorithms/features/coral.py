"""CORAL: the same mean and covariance of the features in every domain."""

from __future__ import annotations

import torch
from torch import Tensor

from .matching import FeatureMatching


class CORAL(FeatureMatching):
    r"""Correlation alignment: ``objective = mean of the domains' losses + w * penalty``.

    .. math::
        \text{penalty} = \frac{2}{D(D-1)}\sum_{i<j}\Bigl[
        \tfrac1F\lVert\mu_i-\mu_j\rVert^2 + \tfrac1{F^2}\lVert C_i-C_j\rVert_F^2\Bigr]

    :math:`\mu_d` and :math:`C_d` are mean and unbiased covariance of the features of domain d. This
    is DomainBed's form; the paper has covariances alone, between a source and a target domain, with
    the factor :math:`1/(4F^2)`. The penalty costs D products ``[F, N] [N, F]``.

    Pass the features ``[N, *]``, with their graph, to `backward`. They may come in micro-batches,
    and from several ranks: the penalty is of all of them.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a term.
        penalty_weight: w.
        num_domains: D; default: as many as have been seen. A domain without samples in a batch
            takes no part in it; the covariance of one sample is 0.
        model: its parameters' names are used in messages.

    ``statistics`` holds ``loss``, ``penalty``, ``objective`` (0-dim), ``domain_loss`` (``[D]``, NaN
    for an empty domain) and ``domain_count`` (``[D]``).

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Sun, Saenko: Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV 2016
        Workshops.

    Example:
        >>> opt = fastdg.CORAL(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> features = featurizer(x)
        >>> losses = F.cross_entropy(classifier(features), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains, features=features); opt.step()
    """

    prefix = "coral"

    def penalty(self, features: Tensor, membership: Tensor) -> Tensor:
        return moment_distance(features, membership)


def moment_distance(features: Tensor, membership: Tensor) -> Tensor:
    """Mean over pairs of domains of the distances between means and between covariances, 0-dim."""
    count = membership.sum(1, keepdim=True)
    present = (count > 0).to(count.dtype)
    domains = present.sum()
    mean = membership @ features / count.clamp(min=1)
    centred = features - membership.t() @ mean
    products = [(row.unsqueeze(1) * centred).t() @ centred for row in membership]
    covariance = torch.stack(products) / (count - 1).clamp(min=1).unsqueeze(2)

    def apart(values: Tensor) -> Tensor:
        """Mean over pairs of the mean squared difference; rows of absent domains are 0."""
        flat = values.flatten(1)
        gaps = (flat - flat.sum(0) / domains.clamp(min=1)).square().mean(1) * present.squeeze(1)
        return 2 * gaps.sum() / (domains - 1).clamp(min=1)

    return apart(mean) + apart(covariance)
