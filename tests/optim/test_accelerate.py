"""A loop under Accelerate is the plain loop, with every wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import WRAPS, same
from frameworks import CLIP, EPOCHS, SIZE, losses_of, made, optimizers, plain, rows
from torch import nn
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process, and so does the Trainer that uses it."""
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield
    reset()


def run(
    name: str, epochs: int = EPOCHS, load: Path | None = None, save: Path | None = None, **more: Any
) -> tuple[nn.Module, Any]:
    accelerator = accelerate.Accelerator(cpu=True, **more)
    model = made()
    opt, scheduler = optimizers(model, name)
    model, prepared, loader, scheduler = accelerator.prepare(
        model, opt, DataLoader(rows(), SIZE), scheduler
    )
    assert prepared.optimizer is opt
    if load is not None:
        accelerator.load_state(load)
    for _ in range(epochs):
        for x, y, domain in loader:
            with accelerator.accumulate(model), accelerator.autocast():
                losses = losses_of(model(x), y)
                opt.backward(losses, domain, final=accelerator.sync_gradients)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                prepared.step()
                scheduler.step()
                prepared.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    return model, opt


def compare(model: nn.Module, opt: Any, other: nn.Module, expected: Any) -> None:
    same(model, other)
    assert opt.steps == expected.steps > 0
    assert opt.param_groups[0]["lr"] == expected.param_groups[0]["lr"]


@pytest.mark.parametrize("name", WRAPS)
def test_training(name: str, tmp_path: Path) -> None:
    """Accumulation with a rest, clipping, schedules; and a run that goes on from a checkpoint."""
    model, opt = run(name, gradient_accumulation_steps=2)
    compare(model, opt, *plain(name, 2))
    run(name, epochs=1, save=tmp_path, gradient_accumulation_steps=2)
    compare(*run(name, epochs=1, load=tmp_path, gradient_accumulation_steps=2), model, opt)


def test_bfloat16() -> None:
    compare(*run("Fishr", mixed_precision="bf16"), *plain("Fishr", 1, dtype=torch.bfloat16))
