"""A whole step of MIRO, and its regulariser on maps that are there: ours, and as one would write
it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from head_peers import adam
from models import problem
from torch import Tensor
from torch.nn import functional as F

import fastdg

Run = Callable[[], object]
LAYERS = ["stem", "blocks.1", "blocks.3", "blocks.5", "blocks.7"]  # max pool and the four stages
SAMPLES, WEIGHT = 96, 0.1


class Maps:
    """The maps of the five layers, those of a frozen copy a little apart, and the biases."""

    def __init__(self, samples: int = SAMPLES) -> None:
        torch.manual_seed(0)
        made = problem("resnet18", samples)
        seen: list[Tensor] = []
        modules = dict(made.model.named_modules())
        handles = [
            modules[name].register_forward_hook(lambda m, i, out: seen.append(out))
            for name in LAYERS
        ]
        with torch.no_grad():
            made.model(made.x)
        for handle in handles:
            handle.remove()
        self.oracles = [x + 0.3 * torch.randn_like(x) for x in seen]
        self.features = [x.requires_grad_() for x in seen]
        self.biases = [torch.randn(x.shape[1], requires_grad=True) for x in seen]

    def gradients(self, total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, [*self.features, *self.biases]))


def fused(on: Maps) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        parts = zip(on.features, on.oracles, on.biases, strict=True)
        values = [fastdg.ops.oracle_nll(*part) for part in parts]
        return on.gradients(torch.stack(values).sum(0).mean())

    return run


def reference(on: Maps) -> Callable[[], list[Tensor]]:
    run = fused(on)

    def forced() -> list[Tensor]:
        with fastdg.use_backend("reference"):
            return run()

    return forced


def eager(on: Maps) -> Callable[[], list[Tensor]]:
    """The formula, for autograd."""

    def one(features: Tensor, oracle: Tensor, bias: Tensor) -> Tensor:
        variance = (F.softplus(bias) + 1e-5).view(1, -1, 1, 1)
        return 0.5 * ((features - oracle).square() / variance + variance.log()).mean()

    def run() -> list[Tensor]:
        parts = zip(on.features, on.oracles, on.biases, strict=True)
        return on.gradients(torch.stack([one(*part) for part in parts]).sum())

    return run


REGULARISERS: dict[str, Callable[[Maps], Callable[[], list[Tensor]]]] = {
    "fastdg": fused,
    "fastdg, reference backend": reference,
    "eager": eager,
}


class Training:
    """The network, its data, and Adam."""

    def __init__(self, samples: int = SAMPLES) -> None:
        torch.manual_seed(0)
        self.on = problem("resnet18", samples)
        self.on.model.train()
        for module in self.on.model.modules():  # MIRO's networks keep their batch norm frozen
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()


def plain(at: Training) -> Run:
    opt = adam(at.on)

    def run() -> None:
        opt.zero_grad()
        at.on.losses().mean().backward()
        opt.step()

    return run


def frozen_forward(at: Training) -> Run:
    """The plain step, and the forward of a frozen copy whose maps are thrown away."""
    step, copied = plain(at), copy.deepcopy(at.on.model).eval()

    def run() -> None:
        with torch.no_grad():
            copied(at.on.x)
        step()

    return run


def ours(at: Training) -> Run:
    opt = fastdg.MIRO(adam(at.on), at.on.model, layers=LAYERS, weight=WEIGHT)

    def run() -> None:
        opt.zero_grad()
        opt.backward(at.on.losses(), at.on.domains)
        opt.step()

    return run


def by_hooks(at: Training) -> Run:
    """As the paper's code does it: both networks' maps kept, then the formula."""
    model, copied = at.on.model, copy.deepcopy(at.on.model).eval().requires_grad_(False)
    kept: dict[bool, list[Tensor]] = {True: [], False: []}
    for network in (model, copied):
        modules = dict(network.named_modules())
        for name in LAYERS:
            modules[name].register_forward_hook(
                lambda m, i, out, own=network is model: kept[own].append(out)
            )
    with torch.no_grad():
        model(at.on.x)
    start = math.log(math.expm1(0.1 - 1e-5))  # of which the variance is 0.1
    biases = [torch.full((x.shape[1],), start, requires_grad=True) for x in kept[True]]
    opt = adam(at.on)
    opt.add_param_group({"params": biases, "lr": 10 * opt.param_groups[0]["lr"]})

    def run() -> None:
        for maps in kept.values():
            maps.clear()
        opt.zero_grad()
        loss = at.on.losses().mean()
        with torch.no_grad():
            copied(at.on.x)
        for features, oracle, bias in zip(kept[True], kept[False], biases, strict=True):
            variance = (F.softplus(bias) + 1e-5).view(1, -1, 1, 1)
            nll = ((features - oracle).square() / variance + variance.log()).mean()
            loss = loss + 0.5 * WEIGHT * nll
        loss.backward()
        opt.step()

    return run


STEPS: dict[str, Callable[[Training], Run]] = {
    "plain": plain,
    "plain and a frozen forward": frozen_forward,
    "fastdg": ours,
    "hooks and autograd": by_hooks,
}
