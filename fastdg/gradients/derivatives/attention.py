r"""Fused attention in a differentiable backward, whose derivative PyTorch does not have.

With :math:`Z = s\,q k^T + M` for a mask M, :math:`P = \mathrm{softmax}(Z)`, the delta
:math:`\delta`, :math:`A = \delta v^T` and :math:`A_Z = P (A - \langle P, A\rangle)` the input
gradients are

.. math:: q' = s\,A_Z k, \qquad k' = s\,A_Z^T q, \qquad v' = P^T \delta.

For gradients :math:`(x, y, z)` that come back to them, with
:math:`U = s (x k^T + q y^T)`, :math:`E = \delta z^T` and the maps of `attention_maps`:

.. math:: q^* = s (Z^* k + A_Z y), \quad k^* = s (Z^{*T} q + A_Z^T x), \quad
          v^* = U_A^T \delta, \quad \delta^* = U_A v + P z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch import is_plain
from ...dtypes import to_statistics_dtype
from ...ops.second.attention_maps import attention_maps
from .base import Gradients, OwnDerivative


class AttentionBackward(OwnDerivative):
    """Hooks that give one fused attention's input gradients their derivative."""

    def operands(self) -> Sequence[Tensor | None]:
        return self.node._saved_query, self.node._saved_key, self.node._saved_value

    def mask(self) -> Tensor | None:
        """Return what is added to the scores; None: nothing."""
        of_cpu = hasattr(self.node, "_saved_attn_mask")
        mask = (
            self.node._saved_attn_mask if of_cpu else getattr(self.node, "_saved_attn_bias", None)
        )
        if mask is None and self.node._saved_is_causal:
            q, k, _ = self.operands()
            assert q is not None and k is not None
            mask = q.new_full((q.shape[2], k.shape[2]), -math.inf).triu(1)
        return mask

    def serves(self) -> bool:
        """Whether the attention has no dropout, and a mask without a gradient."""
        node = self.node
        if not super().serves() or node._saved_dropout_p > 0:
            return False
        if any(below is not None for below, _ in node.next_functions[3:]):
            return False
        query, *others = tensors = [x for x in self.operands() if x is not None]
        heads = query.shape[1] if query.dim() == 4 else 0
        alike = all(x.dim() == 4 and len(x) == len(query) for x in others)
        return heads > 0 and alike and all(map(is_plain, tensors))

    def derived(self, found: Sequence[Tensor | None], delta: Tensor) -> Gradients:
        q, k, v = self.operands()
        scale = self.node._saved_scale
        assert q is not None
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        given = _InputGradients.apply(scale, self.mask(), *found[:3], q, k, v, delta)
        return *given, *found[3:]


class _InputGradients(torch.autograd.Function):
    """Gradients of queries, keys and values, which are known."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        mask: Tensor | None,
        of_q: Tensor | None,
        of_k: Tensor | None,
        of_v: Tensor | None,
        *tensors: Tensor,
    ) -> Gradients:
        ctx.save_for_backward(mask, *tensors)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        return of_q, of_k, of_v

    @staticmethod
    def backward(ctx: Any, *ups: Tensor | None) -> tuple[Any, ...]:
        mask, q, k, v, delta = ctx.saved_tensors
        x, y, z = (
            torch.zeros_like(t) if up is None else up for up, t in zip(ups, (q, k, v), strict=True)
        )
        of_operands = _derivative((q, k, v, delta), (x, y, z), mask, ctx.scale)
        return *([None] * 5), *of_operands


def _derivative(
    operands: Sequence[Tensor], ups: Sequence[Tensor], mask: Tensor | None, scale: float
) -> list[Tensor]:
    """Return the gradients of ``operands`` for gradients of all input gradients."""
    heads = operands[0].shape[1]
    q, k, v, delta = rows = [_for_heads(t, heads).flatten(0, 1) for t in operands]
    x, y, z = back = [_for_heads(t, heads).flatten(0, 1) for t in ups]
    # Scores in half precision would be off by more than their softmax may be
    wide_q, wide_k, wide_v, wide_delta = map(to_statistics_dtype, rows)
    wide_x, wide_y, wide_z = map(to_statistics_dtype, back)
    wide_q, wide_x = wide_q * scale, wide_x * scale
    both = torch.cat([wide_x, wide_q], -1) @ torch.cat([wide_k, wide_y], -1).mT
    scores = wide_q @ wide_k.mT
    if mask is not None:
        scores.unflatten(0, (-1, heads)).add_(mask)
    weights, of_scores, of_up, to = attention_maps(
        scores, wide_delta @ wide_v.mT, both, wide_delta @ wide_z.mT, q.dtype
    )
    of_q = torch.baddbmm(to @ k, of_scores, y, beta=scale, alpha=scale)
    of_k = torch.baddbmm(to.mT @ q, of_scores.mT, x, beta=scale, alpha=scale)
    found = of_q, of_k, of_up.mT @ delta, torch.baddbmm(of_up @ v, weights, z)
    return [_of_heads(t, heads, like) for t, like in zip(found, operands, strict=True)]


def _for_heads(t: Tensor, heads: int) -> Tensor:
    """Repeat keys or values ``[B, G, S, E]`` for the heads of each group ``[B, H, S, E]``."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def _of_heads(t: Tensor, heads: int, like: Tensor) -> Tensor:
    """Sum ``[B * H, S, E]`` over the heads of each group, into the shape of ``like``."""
    t = t.unflatten(0, (-1, heads))
    return t if t.shape == like.shape else t.unflatten(1, (like.shape[1], -1)).sum(2)
