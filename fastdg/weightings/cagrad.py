"""CAGrad: the worst domain's progress, near the mean gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..core.hyper import check_reduction, check_weight
from .constrained import (
    ENUMERATED,
    every_support,
    interior_point,
    least,
    nested_supports,
    on_supports,
    to_simplex,
)
from .gram import Gram, GramWeighting


class CAGrad(GramWeighting):
    r"""Conflict-averse gradient descent: the largest progress of the worst domain, at a distance
    from the mean gradient :math:`g_0` of at most c times its length.

    .. math::
        \max_d \min_i\, \langle g_i, d\rangle \quad\text{s.t. } |d - g_0| \le c\,|g_0|,
        \qquad d = g_0 + \frac{c\,|g_0|}{|g_w|}\, g_w,\quad g_w = \sum_d w_d\, g_d

    where w minimises :math:`\langle g_w, g_0\rangle + c\,|g_0|\,|g_w|` on the simplex. A gradient
    of zeros sets no condition. Where :math:`g_w` is zero (no direction is good for all), d is
    :math:`g_0`, as in the authors' code.

    Args:
        c: the radius. 0 gives the mean gradient.
        rescale: divide d by 1 (0, the paper's d and TorchJD's), :math:`1 + c^2` (1, the default
            of the authors' code and of LibMTL), or :math:`1 + c` (2).
        reduction: ``"mean"``, or ``"sum"``: D times that, as in Nash-MTL's code.

    The w is exact: on a given support it is the root of a quadratic equation. The authors' code
    leaves it to SLSQP.

    Reference:
        Liu, Liu, Jin, Stone, Liu: Conflict-Averse Gradient Descent for Multi-task Learning,
        NeurIPS 2021, arXiv:2110.14048.
    """

    def __init__(
        self,
        c: float = 0.5,
        rescale: Literal[0, 1, 2] = 0,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        check_weight("c", c)
        check_rescale("rescale", rescale)
        check_reduction("reduction", reduction)
        self.c, self.rescale, self.reduction = c, rescale, reduction

    def weights(self, gram: Gram) -> Tensor:
        mean = torch.full_like(gram.norms, 1 / len(gram))
        divisor = (1.0, 1 + self.c**2, 1 + self.c)[self.rescale]
        if self.reduction == "sum":
            divisor /= len(gram)
        return (mean + self._towards_the_worst(gram, mean)) / divisor

    def _towards_the_worst(self, gram: Gram, mean: Tensor) -> Tensor:
        r"""The weights of :math:`d - g_0`."""
        radius = self.c * gram.square(mean).sqrt()
        with_mean = gram.products @ mean
        # Being far too good already, a gradient of zeros never is the worst
        with_mean = with_mean.where(gram.present, 1e3 * (1 + self.c))
        if len(gram) <= ENUMERATED:
            supports = every_support(len(gram), mean.device)[1:]
            return best(gram, supports, with_mean, radius, mean.unsqueeze(0)[:0])
        # Some t minimises <g_w, g_0> + t / 2 |g_w|^2 where t |g_w| = c |g_0|, and that grows with t
        low, high = (radius.clamp(min=1e-9) * bound for bound in (1.0, 1e9))
        sets: list[Tensor] = []
        near: list[Tensor] = []
        for _ in range(3):
            share = torch.linspace(0, 1, 16, dtype=mean.dtype, device=mean.device)
            t = low * (high / low) ** share
            linear = with_mean / t.unsqueeze(-1)
            w, slack = interior_point(gram.products, linear, torch.ones_like(mean))
            place = (t * gram.square(w).sqrt() < radius).cumprod(0).sum().clamp(1, len(t) - 1)
            pair = torch.stack([place - 1, place])
            low, high = t[pair].unbind()
            near.append(w[pair])
            sets.append(nested_supports(w[pair], slack[pair])[:, 1:].flatten(0, 1))
        return best(gram, torch.cat(sets), with_mean, radius, torch.cat(near))


def best(gram: Gram, supports: Tensor, with_mean: Tensor, radius: Tensor, near: Tensor) -> Tensor:
    r"""Weights of :math:`d - g_0`, whose support is among ``supports`` ``[M, D]``.

    Args:
        with_mean: products with :math:`g_0`, ``[D]``.
        radius: :math:`c\,|g_0|`.
        near: w that are nearly exact, ``[*, D]``.
    """
    # On a support all have the same progress m: C y = (m - <g_i, g_0>) / n, at length c |g_0|
    sides = torch.stack([1 / gram.norms, with_mean / gram.norms], -1)
    ones, means = on_supports(gram.firm(), sides, supports).unbind(-1)
    a, b, e = ones @ sides[:, 0], means @ sides[:, 0], means @ sides[:, 1] - radius**2
    progress = (b + (b**2 - a * e).clamp(min=0).sqrt()) / a
    made = to_simplex((progress.unsqueeze(-1) * ones - means) / gram.norms, supports)
    made = torch.cat([made, near])
    squares = gram.square(made)
    known = squares > gram.noise * ((made * gram.norms).sum(-1)) ** 2
    towards = torch.where(known, radius / squares.where(known, 1.0).sqrt(), 0.0)
    towards = towards.unsqueeze(-1) * made
    # All of these are at the distance that is allowed: the one with the most progress is d
    found = least(towards, -(towards @ gram.products + with_mean).amin(-1))
    values = made @ with_mean + radius * squares.sqrt()
    length = least(known.double().unsqueeze(-1), values)  # 0: a g_w that is zero has the least
    return found * length


def check_rescale(name: str, value: Any) -> None:
    if isinstance(value, bool) or value not in (0, 1, 2):
        raise ValueError(f"{name}: expected 0, 1 or 2, got {value!r}. Pass 1 for d / (1 + c^2).")
