"""MGDA: the shortest gradient in the convex hull of all."""

from __future__ import annotations

import torch
from torch import Tensor

from .constrained import least, on_supports, proposed, to_simplex
from .gram import Gram, GramWeighting


class MGDA(GramWeighting):
    r"""Multiple-gradient descent: the shortest convex combination, solved exactly.

    .. math:: w = \arg\min_{w \ge 0,\ \sum_d w_d = 1} w^\top K w

    Along it every domain's loss falls, until the combination is zero: then no step improves all. A
    gradient of zeros has all the weight. Of linearly dependent gradients, which share their weight
    in more than one way, it is one way.

    Up to 6 domains all supports are tried in one batched solve; for more, an interior point
    proposes them. (TorchJD's and LibMTL's Frank-Wolfe iterations stop a little above the minimum.)

    Reference:
        Désidéri: Multiple-gradient descent algorithm (MGDA) for multiobjective optimization,
        Comptes Rendus Mathématique 350, 2012. Sener, Koltun: Multi-Task Learning as
        Multi-Objective Optimization, NeurIPS 2018, arXiv:1810.04650.
    """

    def weights(self, gram: Gram) -> Tensor:
        # As y = w n, of gradients of length 1, so that short ones are found beside long ones
        inverse = gram.norms.amin() / gram.norms
        supports, near = proposed(gram.firm(), torch.zeros_like(inverse), inverse)
        supports = supports[1:]
        found = on_supports(gram.firm(), inverse.unsqueeze(-1), supports).squeeze(-1) * inverse
        made = torch.cat([to_simplex(found, supports), near * inverse])
        return least(made, gram.square(made))
