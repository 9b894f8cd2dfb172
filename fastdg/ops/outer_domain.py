"""``outer_domain``: the mean gradient of every domain, from layer inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .outer_moments import check, check_values, domain_rows
from .window import sizes, unfold


def reference(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> Tensor:
    mean = a.new_zeros((offsets.numel() - 1, delta.shape[2], sizes(a.shape, window)[1]))
    for domain, rows in domain_rows(order, offsets):
        d, x = delta[rows].flatten(0, 1), unfold(a[rows], window).flatten(0, 1)
        torch.mm(d.t(), x, out=mean[domain])
        mean[domain] /= rows.numel()
    return mean


def _fake(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> Tensor:
    return a.new_empty((offsets.shape[0] - 1, delta.shape[2], sizes(a.shape, window)[1]))


define(
    "outer_domain(Tensor a, Tensor delta, Tensor order, Tensor offsets, int[] window) -> Tensor",
    reference,
    _fake,
    check,
    check_values,
)
not_differentiable("outer_domain", "for a differentiable mean use outer_moments")


def outer_domain(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int] = ()
) -> Tensor:
    r"""Mean gradient of each domain,
    :math:`G_d = \frac1{n_d}\sum_{i\in d}\sum_t \delta_{it}\otimes a_{it}`.

    Arguments as `outer_moments`. Returns ``[D, O, I]``; zeros for an empty domain. Not
    differentiable.
    """
    return call("outer_domain", a, delta, order, offsets, list(window))
