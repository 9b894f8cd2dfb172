"""Tables: the gradient is zero outside the looked-up rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...factors import Lookup, PerSampleGrad
from ..graph import signed
from ..ownership.layout import Layout, lead
from .registry import BoundRule, Use, plain, rule


@dataclass(frozen=True)
class Rows(BoundRule):
    """Rule for a table whose rows the samples look up."""

    layout: Layout
    parameter: tuple[int, ...]

    def saved(self, node: Any) -> tuple[Any, ...]:
        return (node._saved_indices,)

    def factor(self, node: Any, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        index = saved[0].flatten()
        delta = delta.reshape(index.shape[0], self.parameter[1])
        padding = index == signed(node._saved_padding_idx)
        delta = delta.masked_fill(padding.unsqueeze(1), 0)
        return Lookup(self.layout.rows(index), self.layout.rows(delta), self.parameter[0])


@rule("EmbeddingBackward0", slots=[0])
def embedding(use: Use) -> BoundRule | None:
    node: Any = use.node
    rows = lead(use.owner, use.output, tuple(range(len(use.output) - 1)))
    if rows is None or plain(use.chain) or node._saved_scale_grad_by_freq:
        return None
    if len(use.output) < 2:
        return None
    return Rows(Layout.of(rows, use.samples), use.parameter)


@dataclass(frozen=True)
class Bags(BoundRule):
    """Rule for a table of which the samples read bags of rows, their sums or means.

    Attributes:
        layout: layout of the bags.
        sample: sample of each bag; -1: none.
        parameter: shape of the table.
    """

    layout: Layout
    sample: Tensor
    parameter: tuple[int, ...]

    def saved(self, node: Any) -> tuple[Any, ...]:
        mean = node._saved_mode == _MEAN
        size = node._saved_result2 if mean else None
        return node._saved_indices, node._saved_offsets, size, node._saved_per_sample_weights

    def factor(self, node: Any, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        index, offsets, size, weights = saved
        if size is not None:
            delta = delta / size.clamp(min=1).unsqueeze(1)
        place = torch.arange(len(index), device=index.device, dtype=offsets.dtype)
        bag = torch.searchsorted(offsets, place, right=True) - 1
        left_out = (index == signed(node._saved_padding_idx)) | (bag >= len(delta))
        bag = bag.clamp(max=len(delta) - 1)
        sample = self.sample[bag]
        left_out |= sample < 0
        delta = delta[bag]
        if weights is not None:
            delta = delta * weights.unsqueeze(1)
        delta = delta.masked_fill(left_out.unsqueeze(1), 0)
        rows, samples = self.parameter[0], self.layout.samples
        return Lookup.ragged(index.long(), delta, sample.clamp(min=0), rows, samples)


_MEAN, _MAX = 1, 2  # modes of EmbeddingBag


@rule("EmbeddingBagBackward0", slots=[0])
def embedding_bag(use: Use) -> BoundRule | None:
    node: Any = use.node
    rows = lead(use.owner, use.output, (0,))
    if rows is None or plain(use.chain) or node._saved_scale_grad_by_freq:
        return None
    if node._saved_mode == _MAX:
        return None
    return Bags(Layout.of(rows, use.samples), rows.clone(), use.parameter)
