"""Whole training steps of the GPU's rows: what is timed there is counted on fake tensors here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from gpu_models import Size, network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import fastdg

Run = Callable[[], Any]
PRECISIONS = ("fp32", "tf32", "bf16")


def set_precision(name: str) -> None:
    """Products of fp32 numbers: exactly, or in TF32."""
    kind = "ieee" if name == "fp32" else "tf32"
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        backend.fp32_precision = kind


@dataclass
class Training:
    """A network of its own, its optimizer and a batch.

    Domain ids are on the CPU: nothing then needs to be read back.
    """

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    domains: Tensor
    size: Size
    precision: str
    base: Any = None  # the optimizer inside

    @classmethod
    def of(cls, name: str, size: Size, precision: str, device: str, **more: Any) -> Training:
        torch.manual_seed(0)
        with torch.device(device):
            model = network(name, size)
        x = torch.randn(size.samples, 3, size.pixels, size.pixels, device=device)
        y = (torch.arange(size.samples) % 65).to(device)
        # The first samples are domain 0's, as in DomainBed's batches
        domains = torch.arange(size.samples) * size.domains // size.samples
        return cls(name, model, x, y, domains, size, precision, **more)

    def cast(self) -> AbstractContextManager[Any]:
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.x.device.type, torch.bfloat16)

    def losses(self, rows: Any = slice(None)) -> Tensor:
        with self.cast():
            return F.cross_entropy(self.model(self.x[rows]), self.y[rows], reduction="none")

    def optimizer(self) -> torch.optim.Optimizer:
        self.base = torch.optim.Adam(self.model.parameters(), lr=1e-5, fused=True)
        return self.base

    def held(self) -> list[Tensor]:
        """The tensors that live between steps."""
        kept = [x for x in tree_leaves(dict(self.base.state)) if isinstance(x, Tensor)]
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return [self.x, self.y, *self.model.parameters(), *self.model.buffers(), *grads, *kept]

    def spans(self) -> list[slice]:
        n, D = self.size.samples, self.size.domains
        edges = [-(-d * n // D) for d in range(D + 1)]
        return [slice(a, b) for a, b in pairwise(edges)]


def plain(on: Training) -> Run:
    base = on.optimizer()

    def run() -> None:
        base.zero_grad()
        on.losses().mean().backward()
        base.step()

    return run


def wrapped(on: Training, wrap: Callable[..., Any], **settings: Any) -> Run:
    opt = wrap(on.optimizer(), num_domains=on.size.domains, **settings)

    def run() -> None:
        opt.zero_grad()
        opt.backward(on.losses(), on.domains)
        opt.step()

    return run


def fishr(params: str, weight: float) -> Callable[[Training], Run]:
    def make(on: Training) -> Run:
        return wrapped(on, fastdg.Fishr, params=params, penalty_weight=weight, anneal_steps=0)

    return make


def miro(on: Training) -> Run:
    maps = list(on.model.maps)  # type: ignore[arg-type]
    with torch.device(on.x.device):
        oracle = network(on.name, on.size)
    return wrapped(on, fastdg.MIRO, model=on.model, oracle=oracle, layers=maps)


def fish(on: Training) -> Run:
    """A meta-iteration: an inner step for each domain on its samples, and the meta step."""
    D = on.size.domains
    opt = fastdg.Fish(on.optimizer(), num_domains=D, meta_steps=D)
    spans = on.spans()

    def run() -> None:
        for d, rows in enumerate(spans):
            opt.zero_grad()
            opt.backward(on.losses(rows), d)
            opt.step()

    return run


def inner_steps(on: Training) -> Run:
    """Fish's floor: an ordinary step for each domain on its samples."""
    base, spans = on.optimizer(), on.spans()

    def run() -> None:
        for rows in spans:
            base.zero_grad()
            on.losses(rows).mean().backward()
            base.step()

    return run


PLAIN, INNER = "plain", "plain, a step a domain"
# The statistic alone, as in the steps before an anneal
STATISTIC, PENALTY = "Fishr(all), statistic", "Fishr(all)"
STEPS: dict[str, Callable[[Training], Run]] = {
    PLAIN: plain,
    "ERM": lambda on: wrapped(on, fastdg.ERM),
    "Fishr(head)": fishr("head", 1.0),
    STATISTIC: fishr("all", 0.0),
    PENALTY: fishr("all", 1.0),
    "AgrSum": lambda on: wrapped(on, fastdg.AgrSum),
    "PCGrad": lambda on: wrapped(on, fastdg.PCGrad),
    "MIRO": miro,
    INNER: inner_steps,
    "Fish": fish,
}


def training(step: str, name: str, size: Size, precision: str, device: str) -> Training:
    """A network of its own for a step: no wrapper has ever touched another step's."""
    return Training.of(name, size, precision, device)
