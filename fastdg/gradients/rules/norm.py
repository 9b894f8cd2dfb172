"""Normalisations: the weight's gradient is the delta times the normalised input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ... import ops
from ...factors import Dense, NormCall, OfNorm, PerSampleGrad
from ...ops.gradients import statistic_dtype
from ...ops.norm_gradients import dtype_of
from ..ownership.layout import Layout, lead
from .registry import BoundRule, Use, plain, rule

Kind = Literal["layer", "rms", "group", "batch"]


@dataclass(frozen=True)
class Affine(BoundRule):
    """Rule for the weight or bias of a norm.

    Attributes:
        kind: kind of the norm.
        layout: layout of the rows, which are all entries of a channel (of the last dimensions).
        trailing: number of last dimensions of the parameter; 0 for channels in dimension 1.
        weight: whether the parameter is the weight.
        parameter: shape of the parameter.
    """

    kind: Kind
    layout: Layout
    trailing: int
    weight: bool
    parameter: tuple[int, ...]

    def saved(self, node: Any) -> tuple[Any, ...]:
        if not self.weight:
            return ()
        if self.kind == "batch":
            return (node._saved_input, node._saved_running_mean, node._saved_running_var)
        if self.kind == "rms":
            return (node._saved_input, node._saved_result1)
        return (node._saved_input, node._saved_result1, node._saved_result2)

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        return self.factor_beside(node, saved, delta, {})

    def factor_beside(
        self, node: Node, saved: tuple[Any, ...], delta: Tensor, made: dict[str, Any]
    ) -> PerSampleGrad:
        shape = self.layout.samples, *self.parameter
        if self.weight:
            made["bias"] = both = self._both(node, saved, delta)
        elif "bias" in made:  # computed with the weight's
            both = made.pop("bias")
        else:
            return Dense(
                self._rows(delta).sum((1, 3), dtype=statistic_dtype(delta.dtype)).reshape(shape)
            )
        if isinstance(both, NormCall):
            return OfNorm(both, not self.weight, shape)
        return Dense(both[not self.weight].reshape(shape))

    def _both(
        self, node: Any, saved: tuple[Any, ...], delta: Tensor
    ) -> tuple[Tensor, Tensor] | NormCall:
        """Compute the gradients of weight and bias; on a GPU, where a launch takes long, later."""
        x, *statistics = saved
        dtype, eps = dtype_of(x, delta), None
        x, delta = self._rows(x), self._rows(delta)
        mean: Tensor | None = None
        if self.kind == "batch":
            mean, rstd = (s.to(dtype).expand(*x.shape[:3]) for s in statistics)
            eps = node._saved_eps
        else:
            *means, rstd = (self._lines(s.to(dtype)) for s in statistics)
            mean = means[0] if means else None
        own = self.kind != "batch"
        if delta.is_cpu or torch.is_grad_enabled():
            return ops.norm_gradients(x, delta, mean, rstd, own=own, eps=eps)
        return NormCall(x, delta, mean, rstd, own, eps)

    def _lines(self, statistic: Tensor) -> Tensor:
        """Rearrange mean or rstd of each row to ``[N, T, G]``."""
        if self.trailing:
            statistic = statistic.flatten(0, -self.trailing - 1).flatten(1)
        return self.layout.rows(statistic)

    def _rows(self, x: Tensor) -> Tensor:
        """Rearrange ``x`` to ``[N, T, C, S]``, as a view if possible."""
        if self.trailing:
            rows = x.flatten(0, -self.trailing - 1)
            return self.layout.rows(rows.flatten(1)).unsqueeze(3)
        return self.layout.rows(x.flatten(2) if x.dim() > 2 else x.unsqueeze(2))


@rule("NativeLayerNormBackward0", slots=[1, 2])
def layer_norm(use: Use) -> BoundRule | None:
    return _features("layer", use)


@rule("FusedRmsNormBackward0", slots=[1])
def rms_norm(use: Use) -> BoundRule | None:
    return _features("rms", use)


@rule("NativeGroupNormBackward0", slots=[1, 2])
def group_norm(use: Use) -> BoundRule | None:
    return _channels("group", use)


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", slots=[1, 2])
def batch_norm(use: Use) -> BoundRule | None:
    if use.node._saved_training:  # type: ignore[attr-defined]
        return None
    return _channels("batch", use)


def _features(kind: Kind, use: Use) -> BoundRule | None:
    trailing = len(use.node._saved_normalized_shape)  # type: ignore[attr-defined]
    rows = lead(use.owner, use.output, tuple(range(len(use.output) - trailing)))
    if rows is None or plain(use.chain) or trailing == len(use.output):
        return None
    return Affine(kind, Layout.of(rows, use.samples), trailing, use.slot == 1, use.parameter)


def _channels(kind: Kind, use: Use) -> BoundRule | None:
    rows = lead(use.owner, use.output, (0,))
    if rows is None or plain(use.chain):
        return None
    return Affine(kind, Layout.of(rows, use.samples), 0, use.slot == 1, use.parameter)
