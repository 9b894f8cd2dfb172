"""Distance of two distributions by a sum of Gaussian kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gaussians(x: Tensor, gammas: Sequence[float]) -> Tensor:
    r"""Compute :math:`\sum_\gamma \exp(-\gamma \lVert x_i - x_j\rVert^2)`, ``[N, N]`` float64.

    Args:
        x: ``[N, F]``.
        gammas: inverse widths.
    """
    x = x.double()  # the narrowest kernel makes rounding of distances a thousand times larger
    square = x.square().sum(1)
    distance = (square.unsqueeze(1) + square - 2 * x @ x.t()).clamp(min=1e-30)
    return torch.stack([(distance * -gamma).exp() for gamma in gammas]).sum(0)
