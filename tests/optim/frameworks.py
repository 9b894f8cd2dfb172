"""The plain loop that frameworks are compared with, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from bases import BASES, WRAPS, network
from on_device import DEVICE
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

EPOCHS, BATCHES, SIZE, CLIP = 2, 5, 9, 0.05


def rows() -> TensorDataset:
    """Inputs, labels and domains of `BATCHES` batches."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCHES * SIZE, 4, generator=generator)
    y = torch.randint(3, (BATCHES * SIZE,), generator=generator)
    return TensorDataset(x, y, torch.arange(BATCHES * SIZE) % 3)


def made() -> nn.Module:
    torch.manual_seed(0)
    return network()


def optimizers(model: nn.Module, name: str) -> tuple[Any, ExponentialLR]:
    opt = WRAPS[name](BASES["adam"](model.parameters()))
    return opt, ExponentialLR(opt, gamma=0.9)


def plain(
    name: str, accumulate: int, clip: float = CLIP, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """A trained model and its optimizer; under autocast to ``dtype`` if that is given."""
    model = made()
    opt, scheduler = optimizers(model, name)
    batches = list(zip(*(t.split(SIZE) for t in rows().tensors), strict=True))
    for _ in range(EPOCHS):
        for i, (x, y, domain) in enumerate(batches):
            if i % accumulate == 0:
                opt.zero_grad()
            with torch.autocast(DEVICE, dtype) if dtype is not None else nullcontext():
                losses = losses_of(model(x), y)
            final = (i + 1) % accumulate == 0 or i + 1 == BATCHES
            opt.backward(losses, domain, final)
            if final:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
                scheduler.step()
    return model, opt


def losses_of(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="none")
