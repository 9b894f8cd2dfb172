"""Linear, with any leading dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..factors import Dense, Factor, Outer
from . import register_rule


def positions(x: Tensor) -> Tensor:
    """``[N, *, I] -> [N, T, I]``."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


@register_rule(nn.Linear)
def linear(module: nn.Linear, inputs: tuple[Any, ...], delta: Tensor) -> dict[str, Factor]:
    if delta.dim() < 2:
        raise ValueError(f"Linear: expected a batch (N, ..., {module.in_features}), got one sample")
    weight, bias = module.weight, module.bias
    factors: dict[str, Factor] = {}
    if weight.requires_grad:
        factors["weight"] = Outer(positions(inputs[0]), positions(delta), weight.shape)
    if bias is not None and bias.requires_grad:
        factors["bias"] = Dense(delta if delta.dim() == 2 else positions(delta).sum(1))
    return factors
