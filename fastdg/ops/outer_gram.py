"""``outer_gram``: inner products between the domains' mean gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .moments import domain_of
from .outer_moments import check, check_values
from .window import sizes


def reference(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> Tensor:
    T, inputs = sizes(a.shape, window)
    outputs, domains = delta.shape[2], offsets.numel() - 1
    samples = order.numel()
    count = offsets[1:] - offsets[:-1]
    # Sample by sample: N^2 (I + O) products and no gradient; else the domains' own, N T I O.
    if T == 1 and not window and samples * (inputs + outputs) <= inputs * outputs:
        x, d = a[order, 0], delta[order, 0]
        pairs = (d @ d.t()) * (x @ x.t())  # <g_i, g_j>
        domain, n = domain_of(order, offsets), count.clamp(min=1).to(a.dtype)
        # Sums, not products with zeros, which would carry a NaN over to the other domains.
        rows = a.new_zeros((domains, samples)).index_add(0, domain, pairs) / n.unsqueeze(1)
        return a.new_zeros((domains, domains)).index_add(1, domain, rows) / n
    flat = torch.ops.fastdg.outer_domain(a, delta, order, offsets, window).flatten(1)
    empty = count == 0
    return (flat @ flat.t()).masked_fill_(empty | empty.unsqueeze(1), 0)


def _fake(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> Tensor:
    return a.new_empty((offsets.shape[0] - 1, offsets.shape[0] - 1))


define(
    "outer_gram(Tensor a, Tensor delta, Tensor order, Tensor offsets, int[] window) -> Tensor",
    reference,
    _fake,
    check,
    check_values,
)
not_differentiable("outer_gram", "for a differentiable result use outer_moments")


def outer_gram(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int] = ()
) -> Tensor:
    r"""Gram matrix :math:`\langle G_d, G_e\rangle` of the domains' mean gradients.

    Takes the cheaper of two contraction orders. Arguments as `outer_moments`. Returns ``[D, D]``;
    zero rows for an empty domain. Not differentiable.
    """
    return call("outer_gram", a, delta, order, offsets, list(window))
