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

    With as many components as gradients that are linearly independent, to the rounding of their
    cosines: short gradients beside long ones count. Without any gradient the weights are even.

    Args:
        reduction: ``"mean"``, as above and in TorchJD, or ``"sum"``: D times that, as in LibMTL.

    `torch.linalg.eigh` waits for a CUDA device.

    Reference:
        Senushkin, Patakin, Kuznetsov, Konushin: Independent Component Alignment for Multi-Task
        Learning, CVPR 2023, arXiv:2305.19000.
    """

    def __init__(self, reduction: Literal["mean", "sum"] = "mean") -> None:
        check_reduction("reduction", reduction)
        self.reduction = reduction

    def weights(self, gram: Gram) -> Tensor:
        values, vectors = torch.linalg.eigh(gram.products)
        alike = torch.linalg.eigvalsh(gram.cosines)
        rank = (alike > gram.noise * alike[-1]).sum() - (~gram.present).sum()
        place = torch.arange(len(gram) - 1, -1, -1, device=values.device)
        kept = (place < rank) & (values > 0)
        smallest = values.where(kept, torch.inf).amin()
        share = torch.where(kept, (smallest / values.where(kept, 1.0)).sqrt(), 0.0)
        # Without any gradient nothing is to be aligned
        share = torch.where(kept.any(), share, 1.0)
        ones = torch.ones_like(values)
        if self.reduction == "mean":
            ones = ones / len(gram)
        return (vectors * share) @ (vectors.t() @ ones)
