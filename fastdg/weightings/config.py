"""ConFIG: the same angle to every gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import Gram, GramWeighting


class ConFIG(GramWeighting):
    r"""Conflict-free inverse gradients: the direction with the same angle to all gradients, as long
    as their projections onto it together.

    .. math::
        u = C^{+}\mathbf{1}\,/\,n, \quad C_{de} = \frac{K_{de}}{n_d n_e}, \qquad
        w = u\; \frac{\mathbf{1}^\top K u}{u^\top K u}

    The paper has it on the matrix of unit gradients, whose pseudo-inverse this is. A gradient of
    zeros has weight 0. Where no direction is at an acute angle to all (two opposed gradients), the
    weights are zeros.

    `torch.linalg.eigh` makes the pseudo-inverse, and waits for a CUDA device once.

    Reference:
        Liu, Chu, Thuerey: ConFIG: Towards Conflict-free Training of Physics Informed Neural
        Networks, ICLR 2025, arXiv:2408.11104.
    """

    def weights(self, gram: Gram) -> Tensor:
        present = gram.present.double()
        weights = gram.pseudo_inverse() @ present * present / gram.norms
        square = gram.square(weights)
        known = square > gram.noise
        length = (gram.products @ weights).sum()
        return torch.where(known, length / square.where(known, 1.0), 0.0) * weights
