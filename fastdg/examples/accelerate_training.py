"""Accelerate, with gradient accumulation, clipping, a scheduler and a checkpoint."""

import tempfile

import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import fastdg

from . import data, needs

with needs("accelerate"):
    from accelerate import Accelerator


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = data.network()
    opt = fastdg.Fishr(torch.optim.Adam(model.parameters(), lr=1e-3), anneal_steps=4)
    scheduler = CosineAnnealingLR(opt, T_max=8)
    # Keep `opt`: the object that prepare returns steps and clears, but has no `backward`
    model, prepared, loader, scheduler = accelerator.prepare(model, opt, data.mixed(), scheduler)

    for _ in range(2):
        for x, y, domain in loader:
            with accelerator.accumulate(model), accelerator.autocast():
                losses = F.cross_entropy(model(x), y, reduction="none")
                # in place of accelerator.backward(losses.mean())
                opt.backward(losses, domain, final=accelerator.sync_gradients)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                prepared.step()
                scheduler.step()
                prepared.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)  # the wrapper's state is in the optimizer's
        accelerator.load_state(folder)
    accuracy = data.accuracy(model, *(part.to(accelerator.device) for part in data.unseen()))
    print(f"{opt.steps} steps, {accuracy:.0f} % on a new camera")


if __name__ == "__main__":
    main()
