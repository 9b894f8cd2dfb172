"""A whole step of ADIOS: ours, one encode for each of both images of a pair, and what the encodes
alone take."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from models import problem
from torch import Tensor, nn

import fastdg

Run = Callable[[], object]
MASKS, IMAGES, PENALTY, ENTROPY = 4, 32, 0.9, 0.7


class Setup:
    """The encoder is the ResNet-18 of the other benchmarks, with 64 outputs for an embedding."""

    def __init__(self, images: int = IMAGES) -> None:
        torch.manual_seed(0)
        made = problem("resnet18", images)
        self.network, (_, *shape) = made.model, made.x.shape
        with torch.no_grad():
            width = self.network(made.x[:1]).shape[1]
        self.objective = fastdg.SimCLR(nn.Sequential(self.network, nn.Linear(width, 64)))
        self.masker = fastdg.UNetMasker(MASKS, shape[0], width=8)
        self.whole, self.view = torch.randn(2, images, *shape)
        self.first = torch.optim.SGD(self.objective.parameters(), lr=1e-3)
        self.second = torch.optim.SGD(self.masker.parameters(), lr=1e-3)

    def weights(self) -> list[Tensor]:
        both = *self.objective.parameters(), *self.masker.parameters()
        return [p.detach() for p in both]


def ours(on: Setup) -> Run:
    adios = fastdg.ADIOS(
        on.first,
        on.second,
        on.masker,
        objective=on.objective,
        penalty=PENALTY,
        entropy=ENTROPY,
    )
    return lambda: adios.step(on.whole, on.view)


def by_pairs(on: Setup) -> Run:
    """As the paper's code does it: both images of every pair, in both steps."""

    def losses(masks: Tensor) -> list[Tensor]:
        hidden = [on.view * (1 - masks[:, k : k + 1]) for k in range(MASKS)]
        return [on.objective(on.whole, x) for x in hidden]

    def run() -> None:
        on.first.zero_grad()
        with torch.no_grad():
            masks = on.masker(on.view)
        torch.stack(losses(masks)).sum().backward()
        on.first.step()
        on.second.zero_grad()
        masks = on.masker(on.view)
        areas = masks.flatten(2).mean(2)
        penalty = (1 / ((math.pi * areas).sin() + 1e-10)).mean(0).sum()
        share = areas.softmax(1)
        gain = torch.stack(losses(masks)).sum() - PENALTY * penalty
        (-(gain + ENTROPY * (share * share.log()).sum())).backward()
        on.second.step()

    return run


def encodes(on: Setup) -> Run:
    """N + 1 forwards for each of the two steps, and their backwards: by the weights in the first,
    by the N masked images in the second. No masks, no objective."""
    network = on.objective.network
    masked = on.view.clone().requires_grad_()

    def run() -> None:
        for images, trained in ((on.view, True), (masked, False)):
            for p in network.parameters():
                p.requires_grad_(trained)
            for k in range(MASKS + 1):
                with torch.set_grad_enabled(trained or k > 0):
                    out = network(on.whole if k == 0 else images)
                if out.requires_grad:
                    out.square().mean().backward()
        network.requires_grad_()

    return run


WAYS: dict[str, Callable[[Setup], Run]] = {
    "encodes alone": encodes,
    "fastdg": ours,
    "a pair of encodes for each mask": by_pairs,
}
