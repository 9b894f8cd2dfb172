"""The input gradient of piecewise linear activations in a differentiable backward.

It is the delta times a slope that is constant on each piece, so its derivative is the same backward
again. PyTorch makes a map of zeros for the derivative of ReLU's slope, and adds it to the gradient
that comes from elsewhere; for hardsigmoid it has no derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Gradients, OwnDerivative

Linear = Callable[[Tensor, Tensor], Tensor]  # of the delta, with a saved tensor


def _relu(delta: Tensor, result: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(delta, result, 0)


class ReluBackward(OwnDerivative):
    """Hooks that give one ReLU's input gradient its derivative."""

    def operands(self) -> Sequence[Tensor | None]:
        return (self.node._saved_result,)

    def derived(self, found: Sequence[Tensor | None], delta: Tensor) -> Gradients:
        return (_InputGradient.apply(found[0], delta, self.node._saved_result, _relu),)


class HardsigmoidBackward(OwnDerivative):
    """Hooks that give one hardsigmoid's input gradient its derivative."""

    def operands(self) -> Sequence[Tensor | None]:
        return (self.node._saved_self,)

    def derived(self, found: Sequence[Tensor | None], delta: Tensor) -> Gradients:
        backward = torch.ops.aten.hardsigmoid_backward
        return (_InputGradient.apply(found[0], delta, self.node._saved_self, backward),)


class _InputGradient(torch.autograd.Function):
    """An input gradient, which is known: ``linear(delta, saved)``."""

    @staticmethod
    def forward(ctx: Any, known: Tensor, delta: Tensor, saved: Tensor, linear: Linear) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.linear = linear
        return known

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[None, Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        return None, ctx.linear(up, saved.detach()), None, None
