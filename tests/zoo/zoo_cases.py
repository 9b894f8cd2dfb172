"""What a case of the zoo is: how a model is made, its inputs, and the losses of its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

N = 6


class Case(NamedTuple):
    """A model of the zoo.

    Attributes:
        family: ``"torch.nn"``, ``"peft"``, ``"timm"``, ``"torchvision"`` or ``"transformers"``.
        name: of the model, within its family.
        make: returns the model and a function that runs it, in the mode it then is in, and returns
            one output with ``axis`` for its samples.
        axis: where the samples are in the output.
    """

    family: str
    name: str
    make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]
    axis: int = 0


def words(text: str) -> list[str]:
    return text.split()


def each_of(names: tuple[str, ...], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same settings for several models."""
    return dict.fromkeys(names, settings)


def losses_of(output: Tensor, axis: int) -> Tensor:
    """Squared distance of each sample's outputs to fixed random targets: ``[N]``."""
    if output.shape[axis] != N:
        raise ValueError(f"output: expected {N} samples in {tuple(output.shape)}")
    rows = output.movedim(axis, 0).reshape(N, -1)
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
    return (rows - target).square().mean(1)


def tensor_of(output: Any) -> Tensor:
    """The first tensor of floats in what a model returns."""
    found = first_tensor(output)
    if found is None:
        raise ValueError("output: expected a tensor of floats, got none")
    return found


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of floats with a graph, or None."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.requires_grad else None
    parts = output.values() if hasattr(output, "values") else output
    if not isinstance(output, (list, tuple)) and not hasattr(output, "values"):
        return None
    return next((t for t in map(first_tensor, parts) if t is not None), None)
