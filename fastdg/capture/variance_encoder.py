"""Likelihood of an oracle's feature map, with one trained variance for each channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..dtypes import to_statistics_dtype
from ..factors import Dense, PerSampleGrad
from ..gradients.rules.registry import register_rule
from ..ops.oracle_nll import FLOOR, bias_gradients
from .feature_maps import Layout

START = 0.1  # initial variance of every channel
BIAS = math.log(math.expm1(START - FLOOR))


class VarianceEncoder(nn.Module):
    """Variances of one layer's channels, and the likelihood of the oracle's maps with them."""

    def __init__(self, like: Tensor, layout: Layout | None) -> None:
        super().__init__()
        # The first forward shows the number of channels
        self.bias = nn.Parameter(
            torch.empty(0, dtype=to_statistics_dtype(like).dtype, device=like.device)
        )
        self.layout = layout

    def begin(self, channels: int, device: torch.device) -> None:
        """Give the bias its size, unless it has one."""
        if self.bias.numel() == 0:
            self.bias.data = self.bias.new_full((channels,), BIAS, device=device)

    def forward(self, features: Tensor, oracle: Tensor) -> Tensor:
        sample, channel = self.layout or (0, 1)
        return ops.oracle_nll(features, oracle, self.bias, sample=sample, channel=channel)


@register_rule("GeneratedBackwardFor_fastdg_oracle_nll_defaultBackward", slot=2)
def variances(node: Any, delta: Tensor) -> PerSampleGrad:
    bias, squares, *_ = node.saved_tensors
    return Dense(bias_gradients(to_statistics_dtype(delta), bias, squares, node.positions))
