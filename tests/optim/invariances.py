"""The wrappers of the invariance family with settings to try them with, and a training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from definitions import MAKES, Batch, losses_of
from torch import Tensor, nn

import fastdg

ANNEALED = {"penalty_weight": 7.0, "anneal_steps": 3}
WRAPPERS: dict[str, Any] = {
    "VREx": (fastdg.VREx, ANNEALED),
    "IRM": (fastdg.IRM, ANNEALED),
    "IGA": (fastdg.IGA, {"penalty_weight": 0.3}),
    "GroupDRO": (fastdg.GroupDRO, {"eta": 0.5}),
}
every = pytest.mark.parametrize("name", WRAPPERS)


def wrapped(name: str, model: nn.Module, make: str = "adam", **more: Any) -> Any:
    cls, settings = WRAPPERS[name]
    return cls(MAKES[make](model), **{**settings, **more})


def run(opt: Any, model: nn.Module, data: Sequence[Batch]) -> list[dict[str, Tensor]]:
    seen = []
    for x, y, d in data:
        opt.zero_grad()
        opt.backward(losses_of(model, x, y), d)
        opt.step()
        seen.append(opt.statistics)
    return seen


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]
