"""Lightning, with automatic and with manual optimization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastdg

from . import data, needs

with needs("lightning"):
    import lightning


class Automatic(lightning.LightningModule):
    """Lightning calls backward, clips, steps and accumulates, as its Trainer is set."""

    def __init__(self) -> None:
        super().__init__()
        self.model = data.network()

    def training_step(self, batch: data.Batch, batch_idx: int) -> Tensor:
        x, y, domain = batch
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        accumulated = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        self.staged = losses, domain, accumulated or self.trainer.is_last_batch
        return losses.mean()  # Lightning reports it; its gradient is never used

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses, domain, final = self.staged
        del self.staged
        self.optimizers().backward(losses, domain, final)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, **_: Any) -> None:
        # In mixed precision Lightning's own takes every wrapper for a fused optimizer and refuses
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> Any:
        base = torch.optim.Adam(self.parameters(), lr=1e-3)
        opt = fastdg.Fishr(base, penalty_weight=100.0, anneal_steps=4)
        scheduler = CosineAnnealingLR(opt, T_max=16)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Automatic):
    """The plain loop."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: data.Batch, batch_idx: int) -> Tensor:
        x, y, domain = batch
        opt = self.optimizers()
        losses = F.cross_entropy(self.model(x), y, reduction="none")
        opt.zero_grad()
        loss = opt.backward(losses, domain)
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        opt.step()
        self.lr_schedulers().step()
        return loss


def main() -> None:
    common: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    for kind, more in [(Automatic, {"gradient_clip_val": 1.0}), (Manual, {})]:
        torch.manual_seed(0)
        module = kind()
        trainer = lightning.Trainer(**common, **more, accelerator="auto", devices=1)
        trainer.fit(module, data.mixed())
        accuracy = data.accuracy(module.model, *data.unseen())
        print(f"{kind.__name__}: {trainer.global_step} steps, {accuracy:.0f} % on a new camera")


if __name__ == "__main__":
    main()
