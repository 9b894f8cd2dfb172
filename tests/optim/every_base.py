"""Optimizers of four packages, with all the ways there are to keep a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

Make = Callable[[nn.Module], Optimizer]


def of_torch(name: str, **settings: Any) -> Make:
    return lambda model: getattr(torch.optim, name)(model.parameters(), **settings)


def of_timm(name: str) -> Make:
    def make(model: nn.Module) -> Optimizer:
        optim = pytest.importorskip("timm.optim", reason="timm is not installed")
        return optim.create_optimizer_v2(model, opt=name, lr=1e-2)

    return make


def of_package(package: str, name: str, inner: Any = None, **settings: Any) -> Make:
    """``inner``: makes the optimizer inside, for one that goes around another."""

    def make(model: nn.Module) -> Optimizer:
        module = pytest.importorskip(package, reason=f"{package} is not installed")
        first = model.parameters() if inner is None else inner(model)
        return getattr(module, name)(first, **settings)

    return make


MOMENTUM = of_torch("SGD", lr=0.05, momentum=0.9)
ADAM = of_torch("Adam", lr=1e-2)
PO, FREE = "pytorch_optimizer", "schedulefree"
BASES: dict[str, Make] = {
    "SGD": MOMENTUM,
    "Adam": ADAM,
    "fused AdamW": of_torch("AdamW", lr=1e-2, fused=True),
    "NAdam": of_torch("NAdam", lr=1e-2),
    "RAdam": of_torch("RAdam", lr=1e-2),
    "RMSprop": of_torch("RMSprop", lr=1e-2, momentum=0.5),
    "Rprop": of_torch("Rprop", lr=1e-2),
    "Adagrad": of_torch("Adagrad", lr=1e-2, initial_accumulator_value=0.1),
    "ASGD": of_torch("ASGD", lr=1e-2),
    "Adafactor": of_torch("Adafactor", lr=1e-2),
    "timm Lookahead": of_timm("lookahead_adamw"),
    "timm LAMB": of_timm("lamb"),
    "timm ADOPT": of_timm("adopt"),
    "timm Lion": of_timm("lion"),
    "timm MARS": of_timm("mars"),
    "timm Adafactor": of_timm("adafactor"),
    "Lookahead": of_package(PO, "Lookahead", ADAM, k=3),
    "Lookahead, pullback": of_package(PO, "Lookahead", MOMENTUM, k=3, pullback_momentum="pullback"),
    "ScheduleFreeWrapper": of_package(PO, "ScheduleFreeWrapper", MOMENTUM),
    "Magma": of_package(PO, "Magma", ADAM),
    "TRAC": of_package(PO, "TRAC", ADAM),
    "StableSPAM": of_package(PO, "StableSPAM", lr=1e-2),
    "SOAP": of_package(PO, "SOAP", lr=1e-2),
    "Shampoo": of_package(PO, "Shampoo", lr=1e-2),
    "AdamWScheduleFree": of_package(FREE, "AdamWScheduleFree", lr=1e-2),
    "SGDScheduleFree": of_package(FREE, "SGDScheduleFree", lr=1e-2),
    "RAdamScheduleFree": of_package(FREE, "RAdamScheduleFree", lr=1e-2),
}
# torch.distributed.checkpoint keeps groups, and state of parameters, and these have more
WITH_MORE = (
    "Lookahead",
    "Lookahead, pullback",
    "ScheduleFreeWrapper",
    "Magma",
    "TRAC",
    "StableSPAM",
)
ODD = (*WITH_MORE, "timm Lookahead", "Adagrad")


def train(opt: Any) -> None:
    """Schedule-free optimizers want to be told that training begins."""
    if hasattr(opt, "train"):
        opt.train()
