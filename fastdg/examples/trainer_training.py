"""Hugging Face's Trainer: `optimizers=`, and one method that calls our backward."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastdg

from . import data, needs

with needs("transformers", "accelerate"):
    from transformers import Trainer, TrainingArguments
    from transformers.modeling_outputs import ImageClassifierOutput


class DomainTrainer(Trainer):
    """Each batch has ``labels`` and ``domains`` beside the model's inputs."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels, domains = inputs.pop("labels"), inputs.pop("domains")
        with self.compute_loss_context_manager():
            losses = F.cross_entropy(model(**inputs).logits, labels, reduction="none")
        opt, final = self.optimizer.optimizer, self.accelerator.sync_gradients
        if final:  # of the micro-batches of one step, the last
            for p in (p for group in opt.param_groups for p in group["params"]):
                p.grad = None  # the Trainer clears the model's; MIRO has parameters of its own
        loss = opt.backward(losses, domains, final)
        # The Trainer adds up the losses of a step; the last one is the mean of all
        return loss if final else torch.zeros_like(loss)


class Classifier(nn.Module):
    """Stands for any model of transformers, whose outputs have ``logits``."""

    def __init__(self) -> None:
        super().__init__()
        self.network = data.network()

    def forward(self, pixel_values: Tensor) -> Any:
        return ImageClassifierOutput(logits=self.network(pixel_values))


def rows(count: int) -> list[dict[str, Tensor]]:
    names = ("pixel_values", "labels", "domains")
    tensors = data.training_set(count).tensors
    return [dict(zip(names, row, strict=True)) for row in zip(*tensors, strict=True)]


def main() -> None:
    torch.manual_seed(0)
    model = Classifier()
    opt = fastdg.Fishr(torch.optim.Adam(model.parameters(), lr=1e-3), anneal_steps=4)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=24,
            gradient_accumulation_steps=2,
            remove_unused_columns=False,  # or `domains` would be one of them
            save_strategy="no",
            report_to="none",
        )
        pair = opt, CosineAnnealingLR(opt, T_max=16)
        trainer = DomainTrainer(model, arguments, train_dataset=rows(128), optimizers=pair)
        result = trainer.train()
    accuracy = data.accuracy(model.network, *data.unseen())
    print(f"{result.global_step} steps, {accuracy:.0f} % on a new camera")


if __name__ == "__main__":
    main()
