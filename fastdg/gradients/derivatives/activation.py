"""An activation's input gradient in a differentiable backward, as one operation.

It is the delta times a function of the activation's input, which PyTorch differentiates in a dozen
operations of the input's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.second.activation_derivative import activation_derivative, recorded
from .base import Gradients, OwnDerivative


class ActivationBackward(OwnDerivative):
    """Hooks that give one activation's input gradient its derivative."""

    def operands(self) -> Sequence[Tensor | None]:
        return (self.node._saved_self,)

    def derived(self, found: Sequence[Tensor | None], delta: Tensor) -> Gradients:
        kind = "silu" if self.node.name() == "SiluBackward0" else "gelu"
        if getattr(self.node, "_saved_approximate", "none") == "tanh":
            kind = "gelu, tanh"
        return (_InputGradient.apply(found[0], self.node._saved_self, delta, kind),)


class _InputGradient(torch.autograd.Function):
    """An activation's input gradient, which is known: ``delta * f'(x)``."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, x: Tensor, delta: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x, delta)
        ctx.kind = kind
        return known

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[None, Tensor, Tensor, None]:
        derivative = recorded if torch.is_grad_enabled() else activation_derivative
        x, delta = ctx.saved_tensors
        return None, *derivative(x, delta, up, ctx.kind), None
