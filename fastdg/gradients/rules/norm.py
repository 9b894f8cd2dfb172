"""Normalisations: the weight's gradient is the delta times the normalised input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ...statistics.factors import Dense, Factor, accumulated
from ..layout import Layout, lead
from . import Served, Use, plain, rule

Kind = Literal["layer", "group", "batch"]


@dataclass(frozen=True)
class Affine(Served):
    """Weight or bias of a norm.

    Attributes:
        kind: how the input is normalised.
        layout: of the rows, which are all entries of a channel (of the last dimensions).
        trailing: number of last dimensions that the parameter has; 0 for channels in dimension 1.
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
        return (node._saved_input, node._saved_result1, node._saved_result2)

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> Factor:
        delta = accumulated(delta)
        if self.weight:
            normalised = self._normalised(node, saved)
            # Memory of the size of an activation is made once, where no derivative looks at it
            free = not torch.is_grad_enabled() and normalised.dtype == delta.dtype
            delta = normalised.mul_(delta) if free else delta * normalised
        if self.trailing:
            rows = delta.flatten(0, -self.trailing - 1)
        else:
            # Positions of one row first: the layout is of the batch dimension alone
            rows = delta.flatten(2).sum(2) if delta.dim() > 2 else delta
        return Dense(self.layout.rows(rows).sum(1).reshape(self.layout.samples, *self.parameter))

    def _normalised(self, node: Any, saved: tuple[Any, ...]) -> Tensor:
        x, mean, spread = (accumulated(t) for t in saved)
        if self.kind == "batch":
            wide = (-1, *[1] * (x.dim() - 2))
            mean, scale = mean.to(x.dtype), (spread.to(x.dtype) + node._saved_eps).rsqrt()
            return _times(x - mean.view(wide), scale.view(wide))
        if self.kind == "group":
            groups = x.reshape(x.shape[0], node._saved_group, -1)
            return _standard(groups, mean.unsqueeze(2), spread.unsqueeze(2), (2,)).view(x.shape)
        return _standard(x, mean, spread, tuple(range(-self.trailing, 0)))


def _standard(x: Tensor, mean: Tensor, rstd: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``(x - mean) * rstd``; what the operation has saved of mean and rstd carries no graph, so
    they are made again where the result is differentiated."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _times(x - mean, rstd)
    centred = x - x.mean(dims, keepdim=True)
    variance = centred.square().mean(dims, keepdim=True)
    eps = (rstd.pow(-2) - variance).detach()
    return centred * (variance + eps).rsqrt()


def _times(centred: Tensor, scale: Tensor) -> Tensor:
    """Their product, in the memory of ``centred`` where no derivative looks at it."""
    if torch.is_grad_enabled() or centred.dtype != torch.result_type(centred, scale):
        return centred * scale
    return centred.mul_(scale)


@rule("NativeLayerNormBackward0", slots=[1, 2])
def layer_norm(use: Use) -> Served | None:
    trailing = len(use.node._saved_normalized_shape)  # type: ignore[attr-defined]
    rows = lead(use.owner, use.output, tuple(range(len(use.output) - trailing)))
    if rows is None or plain(use.chain) or trailing == len(use.output):
        return None
    return Affine("layer", Layout.of(rows, use.samples), trailing, use.slot == 1, use.parameter)


@rule("NativeGroupNormBackward0", slots=[1, 2])
def group_norm(use: Use) -> Served | None:
    return _channels("group", use)


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", slots=[1, 2])
def batch_norm(use: Use) -> Served | None:
    if use.node._saved_training:  # type: ignore[attr-defined]
        return None
    return _channels("batch", use)


def _channels(kind: Kind, use: Use) -> Served | None:
    rows = lead(use.owner, use.output, (0,))
    if rows is None or plain(use.chain):
        return None
    return Affine(kind, Layout.of(rows, use.samples), 0, use.slot == 1, use.parameter)
