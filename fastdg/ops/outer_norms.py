"""``outer_norms``: squared norms of per-sample gradients that are sums of outer products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import to_statistics_dtype
from . import checks
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import statistic_dtype
from .outer_moments import chunks
from .window import sizes, unfold


def reference(a: Tensor, delta: Tensor, window: Sequence[int]) -> Tensor:
    T, inputs = sizes(a.shape, window)
    a, delta = to_statistics_dtype(a), to_statistics_dtype(delta)
    outputs = delta.shape[2]
    # ||sum_t d_t (x) a_t||^2 = sum_ts <d_t,d_s><a_t,a_s>: T^2 (I + O) products against T I O.
    through_gram = T * (inputs + outputs) <= inputs * outputs
    norms = a.new_empty((a.shape[0],))
    every = torch.arange(a.shape[0], device=a.device)
    for part in chunks(every, T * T if through_gram else inputs * outputs):
        d, x = delta[part], unfold(a[part], window)
        if T == 1:
            norms[part] = d.square().sum((1, 2)) * x.square().sum((1, 2))
        elif through_gram:
            products = torch.bmm(d, d.transpose(1, 2)) * torch.bmm(x, x.transpose(1, 2))
            norms[part] = products.sum((1, 2)).clamp_(min=0)
        else:
            norms[part] = torch.bmm(d.transpose(1, 2), x).square_().sum((1, 2))
    return norms


def _fake(a: Tensor, delta: Tensor, window: Sequence[int]) -> Tensor:
    return a.new_empty((a.shape[0],), dtype=statistic_dtype(a.dtype))


define(
    "outer_norms(Tensor a, Tensor delta, int[] window) -> Tensor",
    reference,
    _fake,
    checks.outer,
    halves=(),
)
not_differentiable("outer_norms", "Square the per-sample gradients instead.")


def outer_norms(a: Tensor, delta: Tensor, window: Sequence[int] = ()) -> Tensor:
    r"""Squared norm of each sample's gradient, :math:`\|\sum_t \delta_{it}\otimes a_{it}\|^2`.

    Takes the cheaper of two contraction orders. ``a``, ``delta``, ``window`` as in `outer_moments`.
    Returns ``[N]`` in float32, or in float64 for factors in float64. Not differentiable.
    """
    return call("outer_norms", a, delta, list(window))
