"""CausIRL: the same distribution of the features in two random halves of all domains."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...core.combine.seeded import Seeded
from ...core.hyper import check_one_of, hyper
from ...core.step_batch import StepBatch
from ...domains import to_device_async
from .coral import moment_distance
from .matching import FeatureMatching, all_features
from .mmd import kernel_distance

DISTANCES = {"coral": moment_distance, "mmd": kernel_distance}


class CausIRL(Seeded, FeatureMatching):
    r"""Causality based invariant representations: ``objective = mean of the domains' losses
    + w * penalty``.

    .. math::
        \text{penalty} = \operatorname{distance}(A, B), \qquad
        A = \bigcup_d \{z_{d1}, \dots, z_{dk_d}\}, \quad
        B = \bigcup_d \{z_{d(k_d+1)}, \dots, z_{dn_d}\}, \quad
        k_d \sim \mathcal U\{0, \dots, n_d-1\}

    Each domain's features :math:`z_d`, in their order in the batch, are cut at a random place, and
    A and B have a part of every domain. The distance is that of two domains in `CORAL` or `MMD`;
    with less than two samples in A or B the penalty is 0. All of this is DomainBed's form.

    Inputs and ``statistics`` are those of `CORAL`. Micro-batches, and the samples of several ranks,
    are one batch, in their order.

    Args:
        base: any ``torch.optim.Optimizer`` that steps without a closure, or a term.
        distance: ``"coral"`` or ``"mmd"``: DomainBed's ``CausIRL_CORAL`` and ``CausIRL_MMD``.
        penalty_weight: w.
        generator: where the cuts come from, one number for each domain. Its state is kept in
            ``state_dict`` and restored by loading. Default: torch's own. (DomainBed: NumPy's.)
        num_domains: D; default: as many as have been seen.
        model: its parameters' names are used in messages.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Chevalley, Bunne, Krause, Bauer: Invariant Causal Mechanisms through Distribution Matching,
        2022, arXiv:2206.11646.

    Example:
        >>> opt = fastdg.CausIRL(torch.optim.Adam(model.parameters()), num_domains=3)
        >>> features = featurizer(x)
        >>> losses = F.cross_entropy(classifier(features), y, reduction="none")
        >>> opt.zero_grad(); opt.backward(losses, domains, features=features); opt.step()
    """

    prefix = "caus_irl"
    compares = False  # one domain is cut in two as well

    distance: Literal["coral", "mmd"] = hyper("coral", check_one_of(*DISTANCES))

    def groups(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Return the features ``[N, F]``, and A and B as rows of 0 and 1 ``[2, N]``."""
        features = all_features(batch)
        device = features.device if self.generator is None else self.generator.device
        generator, domains = self.generator_on(device), len(batch.counts)
        draw = torch.rand(domains, generator=generator, dtype=torch.double, device=device)
        count = batch.counts.double()
        cut = (to_device_async(draw, count.device) * count).floor().clamp(max=count - 1)
        before = [
            (place < cut[part.partition.domains]).to(features.dtype)
            for place, part in zip(batch.places_in_domain(), batch.parts, strict=True)
        ]
        first = batch.gathered(before)
        return features, torch.stack([first, 1 - first])

    def penalty(self, features: Tensor, membership: Tensor) -> Tensor:
        distance = DISTANCES[self.distance](features, membership)
        return torch.where((membership.sum(1) > 1).all(), distance, 0.0)
