"""``outer_gram``: inner products between the domains' mean gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import to_statistics_dtype
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import statistic_dtype
from .outer_moments import check, check_values
from .window import sizes


def reference(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> Tensor:
    T, inputs = sizes(a.shape, window)
    outputs, samples = delta.shape[2], order.numel()
    count = offsets[1:] - offsets[:-1]
    # Sample by sample: N^2 (I + O) products and no gradient; else the domains' own, N T I O.
    if T == 1 and not window and samples * (inputs + outputs) <= inputs * outputs:
        x, d = to_statistics_dtype(a[order, 0]), to_statistics_dtype(delta[order, 0])
        pairs = (d @ d.t()) * (x @ x.t())  # <g_i, g_j>
        # Sums, not products with zeros, which would carry a NaN over to the other domains
        ranks = torch.arange(samples, device=order.device)
        rows, _ = torch.ops.fastdg.moments(pairs, ranks, offsets)
        return torch.ops.fastdg.moments(rows.t(), ranks, offsets)[0]
    flat = torch.ops.fastdg.outer_domain(a, delta, order, offsets, window).flatten(1)
    empty = count == 0
    return (flat @ flat.t()).masked_fill_(empty | empty.unsqueeze(1), 0)


def _fake(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> Tensor:
    shape = (offsets.shape[0] - 1, offsets.shape[0] - 1)
    return a.new_empty(shape, dtype=statistic_dtype(a.dtype))


define(
    "outer_gram(Tensor a, Tensor delta, Tensor order, Tensor offsets, int[] window) -> Tensor",
    reference,
    _fake,
    check,
    check_values,
    halves=(),
)
not_differentiable("outer_gram", "For a differentiable result use outer_moments.")


def outer_gram(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int] = ()
) -> Tensor:
    r"""Gram matrix :math:`\langle G_d, G_e\rangle` of the domains' mean gradients.

    Takes the cheaper of two contraction orders. Arguments as `outer_moments`. Returns ``[D, D]``
    in float32, or in float64 for factors in float64; zero rows for an empty domain. Not
    differentiable.
    """
    return call("outer_gram", a, delta, order, offsets, list(window))
