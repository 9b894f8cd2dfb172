"""As SWAD's clone of DomainBed has them: ``update`` takes a list of tensors for each key."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def get_algorithm_class(algorithm_name: str) -> type:
    if algorithm_name not in globals():
        raise NotImplementedError(f"Algorithm not found: {algorithm_name}")
    return globals()[algorithm_name]


class Featurizer(nn.Module):
    n_outputs = 8

    def __init__(self, input_shape: Any) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(input_shape[0], 8), nn.BatchNorm1d(8)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.layer(x)))

    def train(self, mode: bool = True) -> Featurizer:
        super().train(mode)
        self.norm.eval()  # "freeze_bn"
        return self


class Algorithm(nn.Module):
    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: Any) -> None:
        super().__init__()
        self.hparams, self.num_domains = hparams, num_domains

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(x)

    def new_optimizer(self, parameters: Any) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=self.hparams["lr"])

    def clone(self) -> Any:
        clone = copy.deepcopy(self)
        clone.optimizer = self.new_optimizer(clone.network.parameters())
        clone.optimizer.load_state_dict(self.optimizer.state_dict())
        return clone


class ERM(Algorithm):
    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: Any) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer = Featurizer(input_shape)
        self.classifier = nn.Linear(self.featurizer.n_outputs, num_classes)
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.optimizer = self.new_optimizer(self.network.parameters())

    def update(self, x: list[Tensor], y: list[Tensor], **kwargs: Any) -> dict[str, float]:
        loss = F.cross_entropy(self.predict(torch.cat(x)), torch.cat(y))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)
