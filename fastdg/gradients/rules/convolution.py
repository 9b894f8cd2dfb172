"""Convolutions: outer products of deltas and patches, without copies of the patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ...factors import Dense, Outer, PerSampleGrad
from ...ops.window import MOST_TAPS, pad, split
from ..ownership.layout import Layout, lead
from ..plain import recorded
from .registry import BoundRule, Use, plain, rule


@dataclass(frozen=True)
class Patches(BoundRule):
    """Rule for the weight of a convolution over rows of samples.

    Attributes:
        layout: layout of the convolution's batch dimension.
        parameter: shape of the weight.
    """

    layout: Layout
    parameter: tuple[int, ...]

    def saved(self, node: Node) -> tuple[Any, ...]:
        return (node._saved_input,)  # type: ignore[attr-defined]

    def factor(self, node: Any, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        x, delta = _sample_major(saved[0], self.layout), _sample_major(delta, self.layout)
        sizes = list(reversed(node._saved_padding))
        more = [0] * len(sizes)
        if node._saved_transposed:  # its gradient: of a convolution of delta with x
            x, delta, more = delta, x, list(reversed(node._saved_output_padding))
        padding = [p for size, extra in zip(sizes, more, strict=True) for p in (size, size - extra)]
        window = (*self.parameter[2:], *node._saved_stride, *node._saved_dilation)
        rows = _rows(delta)
        if any(padding) and not any(more) and _masked(x, window):
            window = (*window, *reversed(sizes))
        else:
            x = pad(x, padding, "zeros")
        factor = Outer(x, rows, self.parameter, window, node._saved_groups)
        return factor if self.layout.positions == 1 else factor.fold(self.layout.samples)


@dataclass(frozen=True)
class Channels(BoundRule):
    """Rule for the bias of a convolution, which is added to each channel, dimension 1."""

    layout: Layout
    parameter: tuple[int, ...]

    def saved(self, node: Node) -> tuple[Any, ...]:
        return ()

    def factor(self, node: Node, saved: tuple[Any, ...], delta: Tensor) -> PerSampleGrad:
        rows = self.layout.rows(delta.flatten(2).sum(2) if delta.dim() > 2 else delta)
        return Dense(rows.sum(1).reshape(self.layout.samples, *self.parameter))


def _masked(x: Tensor, window: Sequence[int]) -> bool:
    """Return whether kernels on a GPU mask the padding; halves are copied anyway, and padded so."""
    taps = prod(split(window)[0])
    there = not (x.is_cpu or torch.is_grad_enabled()) and x.dtype == torch.float32
    return there and 1 < taps <= MOST_TAPS and x.dim() <= 5


class _Rows(torch.autograd.Function):
    """``[N, O, *S]`` as rows ``[N, T, O]``, with a gradient that lies as the input does: pointwise
    operations on maps that lie differently take many times as long as this one copy."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor) -> Tensor:
        ctx.shape, ctx.contiguous = delta.shape, delta.is_contiguous()
        return delta.flatten(2).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        found = grad.transpose(1, 2).reshape(ctx.shape)
        return found.contiguous() if ctx.contiguous else found


def _rows(delta: Tensor) -> Tensor:
    return _Rows.apply(delta) if recorded(delta) else delta.flatten(2).transpose(1, 2)


def _sample_major(x: Tensor, layout: Layout) -> Tensor:
    return x if layout.kind == "major" else layout.rows(x).flatten(0, 1)


@rule("ConvolutionBackward0", slots=[1])
def weight(use: Use) -> BoundRule | None:
    rows = lead(use.owner, use.output, (0,))
    if rows is None or plain(use.chain):
        return None
    return Patches(Layout.of(rows, use.samples), use.parameter)


@rule("ConvolutionBackward0", slots=[2])
def bias(use: Use) -> BoundRule | None:
    rows = lead(use.owner, use.output, (0,))
    if rows is None or plain(use.chain):
        return None
    return Channels(Layout.of(rows, use.samples), use.parameter)
