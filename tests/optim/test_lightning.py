"""Lightning's loops are the plain loop, with every wrapper."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import BASES, WRAPS, network, same
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

lightning = pytest.importorskip("lightning", reason="lightning is not installed")
from fastdg.examples import lightning_training  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

EPOCHS, BATCHES, CLIP = 2, 5, 0.05


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    domain = torch.arange(9) % 3
    return [
        (torch.randn(9, 4, generator=generator), torch.randint(3, (9,), generator=generator), domain)
        for _ in range(BATCHES)
    ]


def optimizers(model: nn.Module, name: str) -> tuple[Any, ExponentialLR]:
    opt = WRAPS[name](BASES["adam"](model.parameters()))
    return opt, ExponentialLR(opt, gamma=0.9)


class Mixin:
    """The example's module with the network and the optimizer of the tests."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.model = name, network()

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
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=resume)
    return trainer


def plain(name: str, accumulate: int, clip: float) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = network()
    opt, scheduler = optimizers(model, name)
    for _ in range(EPOCHS):
        for i, (x, y, domain) in enumerate(batches()):
            if i % accumulate == 0:
                opt.zero_grad()
            losses = nn.functional.cross_entropy(model(x), y, reduction="none")
            final = (i + 1) % accumulate == 0 or i + 1 == BATCHES
            opt.backward(losses, domain, final)
            if final:
                nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], clip)
                opt.step()
                scheduler.step()
    return model, opt


def compare(module: Any, trainer: Any, model: nn.Module, opt: Any) -> None:
    same(module.model, model)
    assert trainer.global_step == opt.steps == module.wrapper.steps > 0
    assert module.wrapper.param_groups[0]["lr"] == opt.param_groups[0]["lr"]


@pytest.mark.parametrize("name", WRAPS)
def test_automatic_optimization(name: str, tmp_path: Path) -> None:
    """Accumulation with a rest, clipping, schedules; and a run that goes on from a checkpoint."""
    more = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    whole, first, second = Automatic(name), Automatic(name), Automatic(name)
    trainer = fit(whole, **more)
    compare(whole, trainer, *plain(name, 2, 0.05))
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
    x, y, domain = batches()[0]
    losses = nn.functional.cross_entropy(module.model(x), y, reduction="none")
    held.backward(losses, domain, final=False)
    held.zero_grad()
    with pytest.raises(RuntimeError, match="needs a backward before it"):
        opt.step()
    held.load_state_dict(held.state_dict())
    assert set(vars(held)) == {"_optimizer", "_strategy", "_on_before_step", "_on_after_step"}


def test_bfloat16() -> None:
    module, opt = Automatic("Fishr"), None
    fit(module, precision="bf16-mixed")
    torch.manual_seed(0)
    model = network()
    opt, scheduler = optimizers(model, "Fishr")
    for x, y, domain in batches() * EPOCHS:
        with torch.autocast("cpu", torch.bfloat16):
            losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        opt.zero_grad()
        opt.backward(losses, domain)
        opt.step()
        scheduler.step()
    same(module.model, model)
