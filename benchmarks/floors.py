"""The least work each question can cost: counts of multiply-adds from layer shapes.

A unit is one product of the size of a layer's forward. A plain step takes three (output, weight
gradient, input gradient), two for a layer whose input needs no gradient. What is not a matrix
product is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models import Problem
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Layer:
    """One linear map of a forward: N samples, T positions, I inputs, O outputs."""

    N: int
    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    first: bool  # its input needs no gradient

    @property
    def macs(self) -> int:
        return self.N * self.T * self.I * self.O


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one forward: its layers, and products without parameters (attention)."""

    layers: tuple[Layer, ...]
    other: int

    def plain(self) -> int:
        """Forward and backward: output, weight gradient, input gradient."""
        return sum((2 if k.first else 3) * k.macs for k in self.layers) + 3 * self.other

    def moments(self) -> int:
        """Forward, output gradients of every layer, and Σg, Σg² in place of the weight gradient.

        With one position Σg² is a product of its own; with several, both come from the same one.
        """
        total = 3 * self.other
        for k in self.layers:
            total += ((1 if k.first else 2) + (2 if k.T == 1 else 1)) * k.macs
        return total

    def differentiable(self) -> int:
        """`moments`, its backward, the backward of the output gradients, and that of the forward.

        The op's backward takes two products for each operand with one position; with several, one
        to form g_i again and one for each operand. The backward of the chain of output gradients
        takes two a layer.
        """
        total = self.moments() + 6 * self.other
        for k in self.layers:
            operands = 1 if k.first else 2
            total += (2 * operands if k.T == 1 else 1 + operands) * k.macs
            total += (0 if k.first else 2) * k.macs  # backward of delta_in = delta_out W
            total += operands * k.macs  # backward of the forward
        return total

    def head(self) -> int:
        """Plain training of one layer with one position, its moments and their backward."""
        return sum((2 + 4) * k.macs for k in self.layers) + self.plain()


def work(problem: Problem) -> Work:
    """Count one forward of ``problem``."""
    layers: list[Layer] = []

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        first = not args[0].requires_grad
        if isinstance(module, nn.Conv2d):
            taps = module.weight[0].numel()
            layers.append(
                Layer(output.shape[0], output[0, 0].numel(), taps, output.shape[1], first)
            )
        elif isinstance(module, nn.Linear):
            rows = output[0].numel() // output.shape[-1]
            layers.append(
                Layer(output.shape[0], rows, module.in_features, module.out_features, first)
            )

    handles = [m.register_forward_hook(count) for m in problem.model.modules()]
    with FlopCounterMode(display=False) as counter:
        problem.losses()
    for handle in handles:
        handle.remove()
    return Work(tuple(layers), counter.get_total_flops() // 2 - sum(layer.macs for layer in layers))
