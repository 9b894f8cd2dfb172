"""IMTL-G: the same projection onto every gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import Gram, GramWeighting


class IMTLG(GramWeighting):
    r"""Impartial multi-task learning: the combination that has the same projection onto each
    gradient.

    .. math::
        w = \frac{K^{+} n}{\mathbf{1}^\top K^{+} n}, \quad n_d = |g_d|,
        \qquad \Big\langle \sum_e w_e\, g_e, \frac{g_d}{n_d} \Big\rangle
        \text{ is the same for all } d

    Weights sum to 1 and may be negative. Linearly dependent gradients, brought to unit length, are
    combined with the smallest weights. A gradient of zeros has weight 0. Where the sum is zero (two
    opposed gradients) there is no such combination, and the weights are even.

    `torch.linalg.eigh` makes the pseudo-inverse, and waits for a CUDA device once.

    Reference:
        Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: Towards Impartial Multi-task Learning,
        ICLR 2021.
    """

    def weights(self, gram: Gram) -> Tensor:
        present = gram.present.double()
        weights = gram.pseudo_inverse() @ present * present / gram.norms
        total = weights.sum()
        known = total.abs() > gram.noise * weights.abs().sum()
        even = torch.full_like(weights, 1 / len(gram))
        # Weights that are rounding errors alone say nothing, either
        known = known & (weights.abs().amax() > gram.noise)
        return torch.where(known, weights / total.where(known, 1.0), even)
