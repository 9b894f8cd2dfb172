"""Tables: the gradient is zero outside the looked-up rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
        delta = delta * (index != signed(node._saved_padding_idx)).unsqueeze(1)
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
