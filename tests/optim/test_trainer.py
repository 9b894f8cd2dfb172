"""Hugging Face's Trainer is the plain loop, with every wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import WRAPS, same
from frameworks import CLIP, EPOCHS, SIZE, losses_of, made, optimizers, plain, rows
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")
from fastdg.examples import trainer_training

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


class Classifier(trainer_training.Classifier):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.network = made()


class InOrder(trainer_training.DomainTrainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def run(
    name: str, folder: Path, resume: Path | None = None, accumulate: int = 1, **more: Any
) -> tuple[nn.Module, Any, Any]:
    model = Classifier()
    pair = optimizers(model.network, name)
    arguments = trainer_training.TrainingArguments(
        str(folder),
        **{"num_train_epochs": EPOCHS, "save_strategy": "no", "use_cpu": True, **more},
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=CLIP,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        logging_steps=1,
        logging_nan_inf_filter=False,
    )
    names = ("pixel_values", "labels", "domains")
    dataset = [dict(zip(names, row, strict=True)) for row in rows()]
    trainer = InOrder(model, arguments, train_dataset=dataset, optimizers=pair)
    trainer.train(resume_from_checkpoint=resume)
    return model.network, pair[0], trainer


def compare(model: nn.Module, opt: Any, other: nn.Module, expected: Any) -> None:
    same(model, other)
    assert opt.steps == expected.steps > 0
    assert opt.param_groups[0]["lr"] == expected.param_groups[0]["lr"]


@pytest.mark.parametrize("name", WRAPS)
def test_training(name: str, tmp_path: Path) -> None:
    """Accumulation with a rest, clipping, schedules; and a run that goes on from a checkpoint."""
    more = {"accumulate": 2, "save_strategy": "steps", "save_steps": 3}
    model, opt, trainer = run(name, tmp_path, **more)
    compare(model, opt, *plain(name, 2))
    assert trainer.state.global_step == opt.steps
    resumed, opt2, _ = run(name, tmp_path, tmp_path / "checkpoint-3", **more)
    compare(resumed, opt2, model, opt)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_it_logs_is_the_mean_of_the_step(accumulate: int, tmp_path: Path) -> None:
    _, _, trainer = run("AgrSum", tmp_path, accumulate=accumulate)
    x, y, _ = rows()[: accumulate * SIZE]
    expected = losses_of(made()(x), y).mean().item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_bfloat16(tmp_path: Path) -> None:
    model, opt, _ = run("Fishr", tmp_path, bf16=True)
    compare(model, opt, *plain("Fishr", 1, dtype=torch.bfloat16))
