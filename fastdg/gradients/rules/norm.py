"""Normalisations: the weight's gradient is the delta times the normalised input."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ... import ops
from ...factors import Dense, NormCall, OfNorm, PerSampleGrad
from ...ops.gradients import statistic_dtype
from ...ops.norm_gradients import dtype_of
from ..graph import output_shapes
from ..ownership.layout import Layout, lead
from .registry import BoundRule, Use, plain, rule

Kind = Literal["layer", "rms", "group", "batch"]
KINDS: dict[str, Kind] = {
    "NativeLayerNormBackward0": "layer",
    "FusedRmsNormBackward0": "rms",
    "NativeGroupNormBackward0": "group",
    "NativeBatchNormBackward0": "batch",
    "CudnnBatchNormBackward0": "batch",
}


@dataclass(frozen=True)
class NormRows:
    """The rows of a norm's input and of the gradient at its output.

    Attributes:
        kind: kind of the norm.
        layout: layout of the rows, which are all entries of a channel (of the last dimensions).
        trailing: number of last dimensions of the parameters; 0 for channels in dimension 1.
    """

    kind: Kind
    layout: Layout
    trailing: int

    def saved(self, node: Any) -> tuple[Any, ...]:
        if self.kind == "batch":
            return (node._saved_input, node._saved_running_mean, node._saved_running_var)
        if self.kind == "rms":
            return (node._saved_input, node._saved_result1)
        return (node._saved_input, node._saved_result1, node._saved_result2)

    def operands(self, node: Any, saved: tuple[Any, ...], delta: Tensor) -> dict[str, Any]:
        """Return the arguments of `fastdg.ops.norm_gradients`."""
        x, *statistics = saved
        dtype = dtype_of(x, delta)
        x, delta = self.rows(x), self.rows(delta)
        if self.kind == "batch":
            mean, rstd = (s.to(dtype).expand(*x.shape[:3]) for s in statistics)
        else:
            both = (None, *statistics) if self.kind == "rms" else statistics
            mean, rstd = (None if s is None else self._lines(s.detach().to(dtype)) for s in both)
        own, eps = (False, node._saved_eps) if self.kind == "batch" else (True, None)
        return {"x": x, "delta": delta, "mean": mean, "rstd": rstd, "own": own, "eps": eps}

    def _lines(self, statistic: Tensor) -> Tensor:
        """Rearrange mean or rstd of each row to ``[N, T, G]``."""
        if self.trailing:
            statistic = statistic.flatten(0, -self.trailing - 1).flatten(1)
        return self.layout.rows(statistic)

    def rows(self, x: Tensor) -> Tensor:
        """Rearrange ``x`` to ``[N, T, C, S]``, as a view if possible."""
        if self.trailing:
            rows = x.flatten(0, -self.trailing - 1)
            return self.layout.rows(rows.flatten(1)).unsqueeze(3)
        return self.layout.rows(x.flatten(2) if x.dim() > 2 else x.unsqueeze(2))


@dataclass(frozen=True)
class Affine(BoundRule):
    """Rule for the weight or bias of a norm.

    Attributes:
        norm: the rows of the norm.
        weight: whether the parameter is the weight.
        parameter: shape of the parameter.
    """

    norm: NormRows
    weight: bool
    parameter: tuple[int, ...]

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return self.norm.layout

    def saved(self, node: Any) -> tuple[Any, ...]:
        return self.norm.saved(node) if self.weight else ()

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        return self.factor_beside(node, saved, delta, {})

    def factor_beside(
        self, node: Node, saved: tuple[Any, ...], delta: Tensor, made: dict[str, Any]
    ) -> PerSampleGrad:
        shape = self.layout.samples, *self.parameter
        if self.weight and "both" not in made:
            made["both"] = _both(self.norm.operands(node, saved, delta))
        both = made.get("both")
        if both is None:
            rows = self.norm.rows(delta)
            return Dense(rows.sum((1, 3), dtype=statistic_dtype(delta.dtype)).reshape(shape))
        if isinstance(both, NormCall):
            return OfNorm(both, not self.weight, shape)
        return Dense(both[not self.weight].reshape(shape))


def _both(operands: dict[str, Any]) -> tuple[Tensor, Tensor] | NormCall:
    """Compute the gradients of weight and bias; on a GPU, where a launch takes long, later."""
    if operands["delta"].is_cpu or torch.is_grad_enabled():
        return ops.norm_gradients(**operands)
    return NormCall(**operands)


def norm_of(node: Any) -> NormRows | None:
    """Return rows of a norm for its own backward, whatever sample they belong to; None if the node
    is no norm, or one whose rows depend on one another."""
    kind, (shape,) = KINDS.get(node.name()), output_shapes(node)[:1]
    if kind is None or (kind == "batch" and node._saved_training):
        return None
    if kind in ("group", "batch"):
        return NormRows(kind, Layout("major", shape[0], 1, None), 0)
    trailing = len(node._saved_normalized_shape)
    if trailing == len(shape) or 0 in shape:
        return None
    rows = prod(shape[1:-trailing])
    return NormRows(kind, Layout("major", shape[0], rows, None), trailing)


@rule(*(name for name, kind in KINDS.items() if kind in ("layer", "rms")), slots=[1, 2])
def features(use: Use) -> BoundRule | None:
    trailing = len(use.node._saved_normalized_shape)  # type: ignore[attr-defined]
    rows = lead(use.owner, use.output, tuple(range(len(use.output) - trailing)))
    if rows is None or plain(use.chain) or trailing == len(use.output):
        return None
    return _affine(use, rows, trailing)


@rule(*(name for name, kind in KINDS.items() if kind in ("group", "batch")), slots=[1, 2])
def channels(use: Use) -> BoundRule | None:
    if KINDS[use.node.name()] == "batch" and use.node._saved_training:  # type: ignore[attr-defined]
        return None
    rows = lead(use.owner, use.output, (0,))
    if rows is None or plain(use.chain):
        return None
    return _affine(use, rows, 0)


def _affine(use: Use, rows: Tensor, trailing: int) -> Affine:
    norm = NormRows(KINDS[use.node.name()], Layout.of(rows, use.samples), trailing)
    return Affine(norm, use.slot == 1, use.parameter)
