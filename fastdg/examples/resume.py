"""A run that you may kill at any moment, and that ends with the same weights, bit for bit.

    python -m fastdg.examples.resume run.pt    # kill -9 it, start it again, as often as you like

The checkpoint has the whole state of a run: weights, the optimizer with its wrappers' state, the
scheduler, the position in the data, and the states of random generators. It is written under
another name and then renamed, so there is always a complete one. Wrappers that draw random numbers
(PCGrad, AgrRand) save the state of their own ``generator`` in their state dict.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import fastdg

EPOCHS, BATCH = 6, 20


def data(seed: int) -> TensorDataset:
    """Two domains: the first input predicts the label in both, the second helps or misleads."""
    generator = torch.Generator().manual_seed(seed)
    y, domain = torch.arange(200) % 2, torch.arange(200) // 100
    x = torch.randn(200, 4, generator=generator)
    x[:, 0] += 2 * y - 1
    x[:, 1] += (2 * y - 1) * (1 - 2 * domain)
    return TensorDataset(x, y, domain)


def batches(dataset: Dataset[Any], epoch: int, done: int) -> DataLoader[Any]:
    """The rest of an epoch: its order is decided by its number, so a place in it is a number."""
    generator = torch.Generator().manual_seed(epoch)
    rest = torch.randperm(200, generator=generator)[done * BATCH :].tolist()
    # Without a generator each pass over a loader draws a seed from the global random numbers, and
    # a run that starts again within an epoch makes one pass more
    return DataLoader(Subset(dataset, rest), batch_size=BATCH, generator=generator)


@torch.no_grad()
def validation(model: nn.Module, dataset: TensorDataset) -> float:
    model.eval()
    x, y, _ = dataset.tensors
    loss = F.cross_entropy(model(x), y).item()
    model.train()
    return loss


def save(path: Path, state: dict[str, Any]) -> None:
    path = path.resolve()  # a symbolic link stays one
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # for the case that the machine goes down, too
    os.replace(new, path)


def train(path: Path) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    miro = fastdg.MIRO(adam, model, layers=["0"])  # the oracle: the model as it is now
    opt = fastdg.SWAD(fastdg.Fishr(miro, num_domains=2, anneal_steps=20), model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=EPOCHS)
    epoch = done = 0
    if path.exists():  # after everything was made as in a new run
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        scheduler.load_state_dict(state["scheduler"])
        epoch, done = state["epoch"], state["done"]
        torch.set_rng_state(state["random"])  # on a GPU torch.cuda.set_rng_state_all as well

    dataset, held_out = data(seed=1), data(seed=2)
    while epoch < EPOCHS:
        for x, y, domain in batches(dataset, epoch, done):
            losses = F.cross_entropy(model(x), y, reduction="none")
            opt.zero_grad()
            opt.backward(losses, domain)
            opt.step()
            done += 1
            if done % 5 == 0:
                state = {
                    "model": model.state_dict(),
                    "opt": opt.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "epoch": epoch,
                    "done": done,
                    "random": torch.get_rng_state(),
                }
                save(path, state)
        opt.evaluate(validation(model, held_out))
        scheduler.step()
        epoch, done = epoch + 1, 0
    opt.apply()
    return model


def main(path: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = train(path or Path(folder, "run.pt"))
    print(f"validation loss of the averaged weights: {validation(model, data(seed=3)):.9f}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
