"""A convolution's input gradient in a differentiable backward.

It is linear in the delta and in the weight. PyTorch differentiates it by the weight with a
convolution whose kernel is as large as the maps, which takes up to twice as long as the product of
a weight gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Gradients, OwnDerivative

_backward = torch.ops.aten.convolution_backward.default


class ConvolutionBackward(OwnDerivative):
    """Hooks that give one convolution's input gradient its derivative."""

    def operands(self) -> Sequence[Tensor | None]:
        return (self.node._saved_weight,)

    def derived(self, found: Sequence[Tensor | None], delta: Tensor) -> Gradients:
        node, (of_input, *of_parameters) = self.node, found
        weight = node._saved_weight
        geometry = (
            *(node._saved_stride, node._saved_padding, node._saved_dilation),
            *(node._saved_transposed, node._saved_output_padding, node._saved_groups),
        )
        if of_input is not None:
            of_input = _InputGradient.apply(of_input, delta, weight, geometry)
        if any(grad is not None for grad in of_parameters):  # where their sum is asked for
            asked = [False, *(grad is not None for grad in of_parameters)]
            sizes = node._saved_bias_sym_sizes_opt
            of_parameters = _backward(delta, node._saved_input, weight, sizes, *geometry, asked)[1:]
        return of_input, *of_parameters


class _InputGradient(torch.autograd.Function):
    """A convolution's input gradient, which is known: ``of_input = weight^T * delta``."""

    @staticmethod
    def forward(
        ctx: Any, known: Tensor, delta: Tensor, weight: Tensor, geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(delta, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        return known

    @staticmethod
    def backward(ctx: Any, up: Tensor | None) -> tuple[Any, ...]:
        if up is None:
            return None, None, None, None
        delta, weight = ctx.saved_tensors
        _, by_delta, by_weight, _ = ctx.needs_input_grad
        of_delta = torch.convolution(up, weight, None, *ctx.geometry) if by_delta else None
        of_weight = None
        if by_weight:  # as if ``up`` had been the convolution's input
            asked = [False, True, False]
            of_weight = _backward(delta, up, weight, None, *ctx.geometry, asked)[1]
        return None, of_delta, of_weight, None
