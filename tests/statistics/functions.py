"""An `autograd.Function` that no rule knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Scale(torch.autograd.Function):
    """``x * gain`` with x ``[*, C]``, gain ``[C]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        return grad * gain, (grad * x).flatten(0, -2).sum(0)
