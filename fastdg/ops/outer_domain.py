"""``outer_domain``: the mean gradient of every domain, from layer inputs and output gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import to_statistics_dtype
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import statistic_dtype
from .outer_moments import check, check_values, domain_rows
from .window import sizes, unfold


def reference(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> Tensor:
    a, delta = to_statistics_dtype(a), to_statistics_dtype(delta)
    mean = a.new_zeros((offsets.numel() - 1, delta.shape[2], sizes(a.shape, window)[1]))
    for domain, rows in domain_rows(order, offsets):
        d, x = delta[rows].flatten(0, 1), unfold(a[rows], window).flatten(0, 1)
        torch.mm(d.t(), x, out=mean[domain])
        mean[domain] /= rows.numel()
    return mean


def _fake(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> Tensor:
    shape = (offsets.shape[0] - 1, delta.shape[2], sizes(a.shape, window)[1])
    return a.new_empty(shape, dtype=statistic_dtype(a.dtype))


define(
    "outer_domain(Tensor a, Tensor delta, Tensor order, Tensor offsets, int[] window) -> Tensor",
    reference,
    _fake,
    check,
    check_values,
    halves=(),
)
not_differentiable("outer_domain", "For a differentiable mean use outer_moments.")


def outer_domain(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int] = ()
) -> Tensor:
    r"""Mean gradient of each domain,
    :math:`G_d = \frac1{n_d}\sum_{i\in d}\sum_t \delta_{it}\otimes a_{it}`.

    Arguments and precision as in `outer_moments`. Returns ``[D, O, I]`` in float32, or in float64
    for factors in float64; zeros for an empty domain. Not differentiable.
    """
    return call("outer_domain", a, delta, order, offsets, list(window))
