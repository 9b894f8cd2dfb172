"""The first step of a new Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .vector import Vector


def first_adam_step(
    gradient: Vector, groups: Sequence[Mapping[str, Any]], lr: float | None
) -> Vector:
    r"""Compute :math:`-\alpha\,g / (|g| + 10^{-8})`, entry by entry, with
    :math:`g = \text{gradient} + \lambda\theta`.

    It is Adam's first step: with their biases corrected, its moments are g and its square.

    Args:
        gradient: the gradient.
        groups: parameter groups, whose ``weight_decay`` is :math:`\lambda`, 0 without one.
        lr: :math:`\alpha`; None: ``lr`` of the groups.
    """
    moved: dict[Tensor, Tensor] = {}
    for group in groups:
        own = {p: gradient.parts[p] for p in group["params"] if p in gradient.parts}
        rate = group["lr"] if lr is None else lr
        step = partial(_step, rate, group.get("weight_decay", 0.0))
        moved |= Vector(own, gradient.ranks).map(step).parts
    return Vector(moved, gradient.ranks)


def _step(rate: float, decay: float, p: Tensor, gradient: Tensor) -> Tensor:
    gradient = gradient + decay * p
    return -rate * gradient / (gradient.abs() + 1e-8)
