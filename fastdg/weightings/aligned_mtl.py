"""Aligned-MTL: gradients made orthogonal and of one length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core.hyper import check_reduction
from .gram import Gram, GramWeighting


class AlignedMTL(GramWeighting):
    r"""Independent component alignment: the principal components of the gradients all get the
    length of the shortest one.

    .. math::
        K = V \Lambda V^\top, \qquad
        w = \sqrt{\lambda_{\min}}\; V \Lambda^{-1/2} V^\top \tfrac1D \mathbf{1}

    Components whose eigenvalue is zero to rounding are left out of both. Without any gradient the
    weights are even.

    Args:
        reduction: ``"mean"``, as above and in TorchJD, or ``"sum"``: D times that, as in LibMTL.

    `torch.linalg.eigh` waits for a CUDA device once.

    Reference:
        Senushkin, Patakin, Kuznetsov, Konushin: Independent Component Alignment for Multi-Task
        Learning, CVPR 2023, arXiv:2305.19000.
    """

    def __init__(self, reduction: Literal["mean", "sum"] = "mean") -> None:
        check_reduction("reduction", reduction)
        self.reduction = reduction

    def weights(self, gram: Gram) -> Tensor:
        values, vectors = torch.linalg.eigh(gram.products)
        kept = values > gram.noise * values[-1]
        smallest = values.where(kept, torch.inf).amin()
        share = torch.where(kept, (smallest / values.where(kept, 1.0)).sqrt(), 0.0)
        # Without any gradient nothing is to be aligned
        share = torch.where(kept.any(), share, 1.0)
        ones = torch.ones_like(values)
        if self.reduction == "mean":
            ones = ones / len(gram)
        return (vectors * share) @ (vectors.t() @ ones)
