"""Convolutions: outer products of output gradients and patches, which are addressed and never
copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...ops.window import pad
from ..factors import Dense, Factor, Outer
from . import register_rule


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv(
    module: nn.modules.conv._ConvNd, inputs: tuple[Any, ...], delta: Tensor
) -> dict[str, Factor]:
    dims = len(module.kernel_size)
    if delta.dim() != dims + 2:
        raise ValueError(
            f"{type(module).__name__}: expected a batch (N, C, *S), got {tuple(inputs[0].shape)}"
        )
    delta = delta.flatten(2).transpose(1, 2)
    weight, bias = module.weight, module.bias
    factors: dict[str, Factor] = {}
    if weight.requires_grad:
        padded = pad(inputs[0], module._reversed_padding_repeated_twice, module.padding_mode)
        window = (*module.kernel_size, *module.stride, *module.dilation)
        factors["weight"] = Outer(padded, delta, weight.shape, window, module.groups)
    if bias is not None and bias.requires_grad:
        factors["bias"] = Dense(delta.sum(1))
    return factors
