"""Adapters of single algorithms to DomainBed's interface."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional as F

from ..algorithms.risks.sd import SD
from .adapter import Adapter
from .resume import Minibatches


class FishrAdapter(Adapter):
    """On the network of ERM: DomainBed's Fishr has the same, but with BackPACK."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("update_count", torch.tensor([0]))  # type: ignore[attr-defined]


class FishAdapter(Adapter):
    """DomainBed's Fish makes a network anew for every step. Its random numbers decide on the order
    of the data after the first pass over them, so it is made here too where it costs little, and
    not where it would read pre-trained weights."""

    input_shape: tuple[int, ...]
    num_classes: int

    def train_step(self, minibatches: Minibatches) -> dict[str, float]:
        if self.input_shape[1:] == (28, 28):
            type(self.network)(self.input_shape, self.num_classes, self.hparams)
        return super().train_step(minibatches)


class POGMAdapter(Adapter):
    """The authors' updates of ``cag_update`` batches of each domain, which are all made at the last
    of these calls. Before, the weights do not move, and their loss is logged."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.waiting: list[Minibatches] = []

    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
        self.waiting.append(minibatches)  # also where a run that goes on only draws batches
        found = super().update(minibatches, unlabeled)
        if len(self.waiting) == self.hparams["cag_update"]:
            self.waiting = []
        return found

    def train_step(self, minibatches: Minibatches) -> dict[str, float]:
        if len(self.waiting) < self.hparams["cag_update"]:
            self.network.eval()
            with torch.no_grad():
                loss = self.losses(*minibatches[-1])[0].mean()
            self.network.train()
            return {"loss": float(loss)}
        batches = iter([batch[d] for d in range(self.num_domains) for batch in self.waiting])
        self.wrapper().step(lambda d: self.losses(*next(batches))[0])
        return {"loss": float(self.wrapper().statistics["domain_loss"][-1])}


class PGradAdapter(Adapter):
    """Hands the next part of a domain's batch to each of its inner steps."""

    def train_step(self, minibatches: Minibatches) -> dict[str, float]:
        opt: Any = self.wrapper()
        parts = [
            iter([*zip(x.tensor_split(opt.splits), y.tensor_split(opt.splits), strict=True)])
            for x, y in minibatches
        ]
        opt.step(lambda d: self.losses(*next(parts[d]))[0])
        return {"loss": float(opt.statistics["loss"])}


class SMAAdapter(Adapter):
    """Evaluates and saves the averaged network, too, under the authors' name."""

    predicted = 0  # steps when `network_sma` was written

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.network_sma = copy.deepcopy(self.network).eval()

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        opt: Any = self.wrapper()
        if opt.steps != self.predicted:
            with opt.applied():
                self.network_sma.load_state_dict(self.network.state_dict())
            self.predicted = opt.steps
        found: torch.Tensor = self.network_sma(x)
        return found


class FeatureAdapter(Adapter):
    """Hands the classifier's input, or its output, to `backward`."""

    featurizer: torch.nn.Module
    classifier: torch.nn.Module

    def losses(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        features = self.featurizer(x)
        logits = self.classifier(features)
        losses = F.cross_entropy(logits, y, reduction="none")
        if isinstance(self.wrapper(), SD):
            return losses, {"logits": logits}
        return losses, {"features": features}
