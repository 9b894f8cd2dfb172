"""The data of all examples: small images from three cameras, and a fourth to test with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CAMERAS = ["indoor", "street", "night"]
TINTS = (0.95, 0.85, 0.75)  # how often a camera's tint is the label's
MISLEADING = 0.1  # and how often in a camera not seen in training
Batch = tuple[Tensor, ...]  # images [N, 3, 8, 8], labels [N], domains [N]


def images(tint: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two patterns under noise, and a tint. One in four labels is wrong: who goes by the pattern is
    right in 75 %, and in training the tint seems to be the better sign."""
    patterns = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(2, (count,), generator=generator)
    labels = true ^ (torch.rand(count, generator=generator) < 0.25)
    x = 0.7 * patterns[true] + torch.randn(count, 3, 8, 8, generator=generator)
    x[torch.arange(count), labels ^ (torch.rand(count, generator=generator) >= tint)] += 1.0
    return x, labels


def training_set(count: int) -> TensorDataset:
    """Return ``count`` images of each of `CAMERAS`, with labels and domain ids 0, 1 and 2."""
    parts = [images(tint, count, seed) for seed, tint in enumerate(TINTS)]
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return TensorDataset(x, y, torch.arange(len(CAMERAS)).repeat_interleave(count))


def mixed(count: int = 128, batch_size: int = 48) -> DataLoader[Batch]:
    """Batches with samples of all domains, in an order that is the same each time."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(training_set(count), batch_size, shuffle=True, generator=generator)


def by_domain(count: int = 128, batch_size: int = 16) -> list[DataLoader[Batch]]:
    """Return a loader for each domain."""
    everything = training_set(count).tensors
    loaders = []
    for d in range(len(CAMERAS)):
        rows = everything[2] == d
        own = TensorDataset(*(tensor[rows] for tensor in everything))
        generator = torch.Generator().manual_seed(d)
        loaders.append(DataLoader(own, batch_size, shuffle=True, generator=generator))
    return loaders


def unseen() -> tuple[Tensor, Tensor]:
    """Return images and labels from a camera whose tint misleads."""
    return images(MISLEADING, 512, seed=9)


def network() -> nn.Sequential:
    """Return a small convolutional network without batch statistics."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in per cent, in eval mode."""
    training = model.training
    correct = (model.eval()(x).argmax(1) == y).float().mean()
    model.train(training)
    return 100 * correct.item()
