"""UPGrad and DualProj: projections onto the cone of directions that hurt no domain."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.hyper import check_weight
from .constrained import nonnegative
from .gram import Gram, GramWeighting


class UPGrad(GramWeighting):
    r"""The mean of the gradients, each of them first projected onto the dual cone.

    .. math::
        w = \tfrac1D \sum_i v_i, \qquad v_i = \arg\min_{v \ge e_i} v^\top K v

    :math:`\sum_d v_{id}\, g_d` is the nearest vector to :math:`g_i` that has no negative product
    with any gradient, and so their mean has none. A gradient of zeros is counted in the mean.

    Args:
        reg_eps: added to the diagonal of the matrix over its trace. TorchJD's default projector
            has 1e-4 there; the paper, and the default here, nothing. (It also takes a matrix of
            small trace for zeros, and so leaves conflicts of small gradients; here the size does
            not matter.)

    Reference:
        Quinton, Rey: Jacobian Descent for Multi-Objective Optimization, 2024, arXiv:2406.16232.
    """

    def __init__(self, reg_eps: float = 0.0) -> None:
        check_weight("reg_eps", reg_eps)
        self.reg_eps = reg_eps

    def weights(self, gram: Gram) -> Tensor:
        return projected(gram, gram.eye(), self.reg_eps).mean(0)


class DualProj(UPGrad):
    r"""The mean of the gradients, projected onto the dual cone.

    .. math:: w = \arg\min_{w \ge 1/D} w^\top K w

    Args:
        reg_eps: as in `UPGrad`.

    Reference:
        Lopez-Paz, Ranzato: Gradient Episodic Memory for Continual Learning, NeurIPS 2017,
        arXiv:1706.08840, which projects the newest task's gradient; of the mean, as in TorchJD.
    """

    def weights(self, gram: Gram) -> Tensor:
        mean = torch.full_like(gram.norms, 1 / len(gram))
        return projected(gram, mean.unsqueeze(0), self.reg_eps).squeeze(0)


def projected(gram: Gram, least: Tensor, reg_eps: float) -> Tensor:
    r""":math:`\arg\min v^\top K v` over :math:`v \ge l`, for rows l of ``least`` ``[R, D]``."""
    norms, matrix = gram.norms, gram.products
    if reg_eps:
        trace = gram.products.diagonal().sum()
        matrix = matrix + reg_eps * trace.where(trace > 0, 1.0) * gram.eye()
        norms = matrix.diagonal().sqrt()
    # v = l + y / n, and y >= 0
    cosines = matrix / norms / norms.unsqueeze(1)
    cosines.diagonal().fill_(1 + gram.noise)
    return least + nonnegative(cosines, -(least @ matrix) / norms) / norms
