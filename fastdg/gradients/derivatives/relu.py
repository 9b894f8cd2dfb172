"""ReLU's input gradient in a differentiable backward.

It depends on ReLU's result by a mask alone. PyTorch makes a map of zeros for the gradient of that
result, and adds it to the gradient that comes from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Gradients, OwnDerivative

_masked = torch.ops.aten.threshold_backward.default


class ReluBackward(OwnDerivative):
    """Hooks that give one ReLU's input gradient its derivative."""

    def operands(self) -> Sequence[Tensor | None]:
        return (self.node._saved_result,)

    def derived(self, found: Sequence[Tensor | None], delta: Tensor) -> Gradients:
        return (_InputGradient.apply(found[0], delta, self.node._saved_result),)


class _InputGradient(torch.autograd.Function):
    """ReLU's input gradient, which is known: delta where the result is positive."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, delta: Tensor, result: Tensor) -> Tensor:
        ctx.save_for_backward(result)
        return known

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[None, Tensor, None]:
        (result,) = ctx.saved_tensors
        return None, _masked(up, result.detach(), 0), None
