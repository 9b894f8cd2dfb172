"""Calls of fastdg's Python functions in a step on small layers, and what they call of torch and
Python, which takes longer there than the arithmetic: counted, so that it cannot creep back."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdg
from fastdg.gradients import engine
from fastdg.ops.dispatch import registry

N, WIDTH = 32, 16
FEW, MANY = 2, 22  # layers
PACKAGE = str(Path(fastdg.__file__).parent)


def calls(run: Callable[[], None]) -> int:
    """Count the calls of fastdg's Python functions, and of compiled functions by them; what torch's
    Python calls is torch's."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        called = event in ("call", "c_call")
        count += called and frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def step_of(layers: int, params: str) -> Callable[[], None]:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    base = torch.optim.SGD(model.parameters(), foreach=True)
    opt = fastdg.Fishr(base, params=params, anneal_steps=1 << 40, num_domains=3)
    x, rows = torch.randn(N, WIDTH), torch.arange(N)

    def step() -> None:
        opt.zero_grad()
        opt.backward(F.cross_entropy(model(x), rows % WIDTH, reduction="none"), rows % 3)
        opt.step()

    return step


@pytest.mark.parametrize(("params", "of_layer", "of_step"), [("all", 133, 525), ("head", 51, 554)])
def test_calls_of_a_step(
    monkeypatch: pytest.MonkeyPatch, params: str, of_layer: int, of_step: int
) -> None:
    """Before the anneal: of each further layer, and of a step besides its layers."""
    monkeypatch.setattr(engine, "_plans", OrderedDict())
    monkeypatch.setattr(registry, "_forces", False)  # another test may have chosen a backend
    found = {}
    for layers in (FEW, MANY):
        step = step_of(layers, params)
        for _ in range(9):  # plans are made anew in the steps 1, 2, 4 and 8
            step()
        found[layers] = calls(step)
    each = (found[MANY] - found[FEW]) / (MANY - FEW)
    assert each <= of_layer
    assert found[FEW] - FEW * each <= of_step
