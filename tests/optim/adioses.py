"""Small networks, objectives and images for the tests of ADIOS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fastdg

N, B, TAU, ALPHA, BETA = 3, 4, 0.5, 0.3, 0.7
KINDS = ("SimCLR", "BYOL", "SimSiam")


def encoder(norm: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(54, 5),
    )


class Masker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, N, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).softmax(1)


def objective(kind: str, norm: bool = False, total_steps: int | None = None) -> fastdg.Objective:
    if kind == "SimCLR":
        return fastdg.SimCLR(encoder(norm), temperature=TAU)
    predictor = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    if kind == "BYOL":
        return fastdg.BYOL(encoder(norm), predictor, 0.9, total_steps)
    return fastdg.SimSiam(encoder(norm), predictor)


def made(kind: str = "SimCLR", norm: bool = False, **more: Any) -> fastdg.ADIOS:
    aim = more.pop("objective", None) or objective(kind, norm).double()
    masker = Masker().double()
    given = {"objective": aim, "penalty": ALPHA, "entropy": BETA, **more}
    first = SGD(aim.parameters(), lr=0.1, momentum=0.9)
    return fastdg.ADIOS(first, Adam(masker.parameters(), lr=0.05), masker, **given)


def views(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, B, 2, 7, 7, generator=generator, dtype=torch.float64)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-11, atol=1e-12)
