"""Normalisations: the weight's gradient is the output gradient times the normalised input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..factors import Dense, Factor, accumulated
from . import register_rule


def _affine(
    module: Any, normalised: Tensor, delta: Tensor, keep: tuple[int, ...]
) -> dict[str, Factor]:
    """``weight`` and ``bias`` of ``normalised * weight + bias``, summed over all dimensions not in
    ``keep``."""
    delta = accumulated(delta)
    over = tuple(d for d in range(1, delta.dim()) if d not in keep)

    def summed(x: Tensor) -> Factor:
        return Dense(x.sum(over) if over else x)

    weight, bias = module.weight, getattr(module, "bias", None)
    factors: dict[str, Factor] = {}
    if weight is not None and weight.requires_grad:
        # Fresh memory costs more than the product; normalised is nobody else's
        product = delta * normalised if torch.is_grad_enabled() else normalised.mul_(delta)
        factors["weight"] = summed(product)
    if bias is not None and bias.requires_grad:
        factors["bias"] = summed(delta)
    return factors


def _trailing(module: Any, delta: Tensor) -> tuple[int, ...]:
    dims = len(module.normalized_shape)
    if delta.dim() <= dims:
        raise ValueError(f"{type(module).__name__}: expected a batch, got one sample")
    return tuple(range(delta.dim() - dims, delta.dim()))


@register_rule(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, inputs: tuple[Any, ...], delta: Tensor) -> dict[str, Factor]:
    x = F.layer_norm(accumulated(inputs[0]), module.normalized_shape, eps=module.eps)
    return _affine(module, x, delta, _trailing(module, delta))


@register_rule(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm, inputs: tuple[Any, ...], delta: Tensor) -> dict[str, Factor]:
    x = F.rms_norm(accumulated(inputs[0]), module.normalized_shape, eps=module.eps)
    return _affine(module, x, delta, _trailing(module, delta))


@register_rule(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, inputs: tuple[Any, ...], delta: Tensor) -> dict[str, Factor]:
    x = F.group_norm(accumulated(inputs[0]), module.num_groups, eps=module.eps)
    return _affine(module, x, delta, (1,))


def _by_running(module: Any, x: Tensor) -> Tensor:
    """``x`` normalised by the module's running statistics, whatever dtype they are in."""
    mean, var = (accumulated(s).to(x.dtype) for s in (module.running_mean, module.running_var))
    return F.batch_norm(x, mean, var, eps=module.eps)


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(
    module: nn.modules.batchnorm._BatchNorm, inputs: tuple[Any, ...], delta: Tensor
) -> dict[str, Factor]:
    return _affine(module, _by_running(module, accumulated(inputs[0])), delta, (1,))


@register_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(
    module: nn.modules.instancenorm._InstanceNorm, inputs: tuple[Any, ...], delta: Tensor
) -> dict[str, Factor]:
    from_input = module.training or module.running_mean is None
    x = accumulated(inputs[0])
    x = F.instance_norm(x, eps=module.eps) if from_input else _by_running(module, x)
    return _affine(module, x, delta, (1,))
