"""Lightning's loops are the plain loop, with every wrapper."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import WRAPS, same
from frameworks import CLIP, EPOCHS, SIZE, losses_of, made, optimizers, plain, rows
from torch import nn
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
from fastdg.examples import lightning_training  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Mixin:
    """The example's module with the network and the optimizer of the tests."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.model = name, made()

    def configure_optimizers(self) -> Any:
        self.wrapper, scheduler = optimizers(self.model, self.name)
        return {
            "optimizer": self.wrapper,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Automatic(Mixin, lightning_training.Automatic):
    pass


class Manual(Mixin, lightning_training.Manual):
    pass


def fit(module: Any, epochs: int = EPOCHS, resume: Path | None = None, **more: Any) -> Any:
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, **settings, enable_model_summary=False, accelerator="cpu", **more
    )
    trainer.fit(module, DataLoader(rows(), SIZE), ckpt_path=resume)
    return trainer


def compare(module: Any, trainer: Any, model: nn.Module, opt: Any) -> None:
    same(module.model, model)
    assert trainer.global_step == opt.steps == module.wrapper.steps > 0
    assert module.wrapper.param_groups[0]["lr"] == opt.param_groups[0]["lr"]


@pytest.mark.parametrize("name", WRAPS)
def test_automatic_optimization(name: str, tmp_path: Path) -> None:
    """Accumulation with a rest, clipping, schedules; and a run that goes on from a checkpoint."""
    more = {"gradient_clip_val": CLIP, "accumulate_grad_batches": 2}
    whole, first, second = Automatic(name), Automatic(name), Automatic(name)
    trainer = fit(whole, **more)
    compare(whole, trainer, *plain(name, 2))
    fit(first, epochs=1, **more).save_checkpoint(tmp_path / "checkpoint")
    trainer = fit(second, resume=tmp_path / "checkpoint", **more)
    compare(second, trainer, whole.model, whole.wrapper)


@pytest.mark.parametrize("name", WRAPS)
def test_manual_optimization(name: str) -> None:
    module = Manual(name)
    compare(module, fit(module), *plain(name, 1, 1.0))


def test_fewer_batches_than_there_are() -> None:
    module, shorter = Automatic("Fishr"), Automatic("Fishr")
    fit(module, accumulate_grad_batches=2, limit_train_batches=3)
    assert module.wrapper.steps == 2 * EPOCHS
    fit(shorter, accumulate_grad_batches=2, max_steps=3)
    assert shorter.wrapper.steps == 3


def test_what_lightning_hands_out_is_the_wrapper() -> None:
    """Its optimizers inherit from the class of the one they hold."""
    module = Manual("Fishr")
    fit(module)
    held, opt = module.optimizers(), module.wrapper
    assert held is not opt and isinstance(held, type(opt))
    held.penalty_weight = 3.0
    assert opt.penalty_weight == held.penalty_weight == 3.0
    assert held.steps == opt.steps and held.tape is opt.tape
    assert held.statistics is opt.statistics
    x, y, domain = rows()[:SIZE]
    held.backward(losses_of(module.model(x), y), domain, final=False)
    held.zero_grad()
    with pytest.raises(RuntimeError, match="needs a backward"):
        opt.step()
    held.load_state_dict(held.state_dict())
    assert set(vars(held)) == {"_optimizer", "_strategy", "_on_before_step", "_on_after_step"}


def test_bfloat16() -> None:
    module = Automatic("Fishr")
    trainer = fit(module, precision="bf16-mixed", gradient_clip_val=CLIP)
    compare(module, trainer, *plain("Fishr", 1, dtype=torch.bfloat16))
