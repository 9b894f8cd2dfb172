"""What the demo compares: the algorithms, and for each task how it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import Fishr

LEARNING_RATE = 1e-3  # DomainBed's for small images


@dataclass(frozen=True)
class Algorithm:
    """``params`` of `fastdg.Fishr`, or None for plain training."""

    title: str
    params: str | None = None


ALGORITHMS = {
    "erm": Algorithm("ERM"),
    "fishr-head": Algorithm("Fishr, head", "head"),
    "fishr-all": Algorithm("Fishr, all layers", "all"),
}


@dataclass(frozen=True)
class Setting:
    """How a task is trained, the same for every algorithm but for the penalty.

    Attributes:
        batch: samples of each training domain in a step; None for all of them.
        network: (channels, classes) -> the model; without statistics over the batch.
        anneal: share of the steps before the penalty has its weight.
        fishr: further arguments of `fastdg.Fishr`.
        source: where ``anneal`` and ``fishr`` come from, in words.
    """

    batch: int | None
    network: Callable[[int, int], nn.Sequential]
    anneal: float
    fishr: dict[str, Any]
    source: str

    def identity(self) -> dict[str, Any]:
        """What results depend on, for result files."""
        return {
            "batch": self.batch,
            "learning_rate": LEARNING_RATE,
            "anneal": self.anneal,
            "fishr": self.fishr,
        }

    def optimizer(
        self, algorithm: str, model: nn.Module, domains: int, steps: int
    ) -> Optimizer | Fishr:
        """Adam, wrapped if the algorithm asks for it."""
        base = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        params = ALGORITHMS[algorithm].params
        if params is None:
            return base
        anneal = self.anneal_steps(steps)
        return Fishr(base, params=params, anneal_steps=anneal, num_domains=domains, **self.fishr)

    def anneal_steps(self, steps: int) -> int:
        """The step from which the penalty has its weight."""
        return round(self.anneal * steps)


def _perceptron(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * 64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def _convolutions(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


SETTINGS = {
    "coloured": Setting(
        batch=None,
        network=_perceptron,
        anneal=190 / 501,
        fishr={
            "penalty_weight": 91257.18613115903,
            "ema": None,
            "reduction": "sum",
            "pre_anneal_weight": 1.0,
            "reset_base": False,
        },
        source="full batches and the penalty of the Fishr paper's ColoredMNIST script, unchanged "
        "but for its division of the loss by the weight",
    ),
    "rotated": Setting(
        batch=32,
        network=_convolutions,
        anneal=0.3,
        fishr={"penalty_weight": 10.0},
        source="DomainBed's defaults and anneal (30 % of the steps); the weight is the one of 10, "
        "100 and 1000 with the best accuracy on the training domains' held-out parts (seed 100)",
    ),
}
