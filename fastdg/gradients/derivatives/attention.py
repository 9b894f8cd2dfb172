r"""Fused attention in a differentiable backward, whose derivative PyTorch does not have.

With :math:`Z = s\,q k^T`, :math:`P = \mathrm{softmax}(Z)`, the delta :math:`\delta`,
:math:`A = \delta v^T` and :math:`A_Z = P (A - \langle P, A\rangle)` the input gradients are

.. math:: q' = s\,A_Z k, \qquad k' = s\,A_Z^T q, \qquad v' = P^T \delta.

For gradients :math:`(x, y, z)` that come back to them, with
:math:`U = s (x k^T + q y^T)`, :math:`E = \delta z^T` and the maps of `attention_maps`:

.. math:: q^* = s (Z^* k + A_Z y), \quad k^* = s (Z^{*T} q + A_Z^T x), \quad
          v^* = U_A^T \delta, \quad \delta^* = U_A v + P z.
"""

from __future__ import annotations

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

    def serves(self) -> bool:
        """Whether the attention is plain: one key for each head, no dropout, no mask."""
        node = self.node
        if not super().serves() or node._saved_dropout_p > 0 or node._saved_is_causal:
            return False
        of_cpu = hasattr(node, "_saved_attn_mask")
        mask = node._saved_attn_mask if of_cpu else getattr(node, "_saved_attn_bias", None)
        query, *others = tensors = [x for x in self.operands() if x is not None]
        alike = all(x.dim() == 4 and x.shape[:2] == query.shape[:2] for x in others)
        return mask is None and alike and query.dim() == 4 and all(map(is_plain, tensors))

    def derived(self, found: Sequence[Tensor | None], delta: Tensor) -> Gradients:
        q, k, v = self.operands()
        scale = self.node._saved_scale
        assert q is not None
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        given = _InputGradients.apply(scale, *found[:3], q, k, v, delta)
        return *given, *found[3:]


class _InputGradients(torch.autograd.Function):
    """Gradients of queries, keys and values, which are known."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        of_q: Tensor | None,
        of_k: Tensor | None,
        of_v: Tensor | None,
        *tensors: Tensor,
    ) -> Gradients:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        return of_q, of_k, of_v

    @staticmethod
    def backward(ctx: Any, *ups: Tensor | None) -> tuple[Any, ...]:
        q, k, v, delta = ctx.saved_tensors
        x, y, z = (
            torch.zeros_like(t) if up is None else up for up, t in zip(ups, (q, k, v), strict=True)
        )
        of_operands = _derivative((q, k, v, delta), (x, y, z), ctx.scale)
        return None, None, None, None, *of_operands


def _derivative(
    operands: Sequence[Tensor], ups: Sequence[Tensor], scale: float
) -> tuple[Tensor, ...]:
    """Return the gradients of ``operands`` for gradients of all input gradients."""
    q, k, v, delta = rows = [t.flatten(0, 1) for t in operands]
    x, y, z = back = [t.flatten(0, 1) for t in ups]
    # Scores in half precision would be off by more than their softmax may be
    wide_q, wide_k, wide_v, wide_delta = map(to_statistics_dtype, rows)
    wide_x, wide_y, wide_z = map(to_statistics_dtype, back)
    wide_q, wide_x = wide_q * scale, wide_x * scale
    both = torch.cat([wide_x, wide_q], -1) @ torch.cat([wide_k, wide_y], -1).mT
    weights, of_scores, of_up, to = attention_maps(
        wide_q @ wide_k.mT, wide_delta @ wide_v.mT, both, wide_delta @ wide_z.mT, q.dtype
    )
    of_q = torch.baddbmm(to @ k, of_scores, y, beta=scale, alpha=scale)
    of_k = torch.baddbmm(to.mT @ q, of_scores.mT, x, beta=scale, alpha=scale)
    found = of_q, of_k, of_up.mT @ delta, torch.baddbmm(of_up @ v, weights, z)
    return tuple(t.view(like.shape) for t, like in zip(found, operands, strict=True))
