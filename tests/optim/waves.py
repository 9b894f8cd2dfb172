"""Inputs that are the same on every machine and with every torch, a sine wave's values; and
the steps on them that the tests against authors' code take."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = (2, 3, 4)  # samples of each domain


def waves(*shape: int, start: float = 0.0) -> Tensor:
    return (
        (start + 1.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64))
        .sin()
        .view(shape)
    )


@torch.no_grad()
def filled(module: nn.Module) -> nn.Module:
    """``module`` in float64, with a wave in each parameter."""
    for i, p in enumerate(module.double().parameters()):
        p.copy_(waves(*p.shape, start=i))
    return module


def network(outputs: int = 2) -> nn.Sequential:
    """A featurizer and a head."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 2), nn.Tanh()), nn.Linear(2, outputs))
    filled(model)
    return model


def minibatches(step: int, conflict: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels of each domain; where ``conflict``, the domains have little in common."""
    made = []
    for d, size in enumerate(SIZES):
        if conflict:
            x = waves(size, 4, start=10 * step + 3 * d)
        else:
            x = waves(size, 4, start=10 * step) + waves(size, 4, start=10 * step + d + 1) / 2
        made.append((x, (torch.arange(size) + d * conflict) % 2))
    return made


def mixed(step: int, conflict: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same as one batch: inputs, labels and domains."""
    xs, ys = zip(*minibatches(step, conflict), strict=True)
    domains = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
    return torch.cat(xs), torch.cat(ys), domains


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(model: nn.Module) -> Tensor:
    found = [p.grad for p in model.parameters()]
    return flat([grad for grad in found if grad is not None])


def close(got: Tensor, expected: list[float], tolerance: float = 1e-10) -> None:
    other = torch.tensor(expected, dtype=torch.float64)
    error, scale = (got - other).abs().max(), other.abs().max()
    assert error <= tolerance * scale, f"off by {error / scale:.1e} of the largest entry"


def step(opt: Any, model: nn.Module, number: int, conflict: bool = False) -> None:
    x, y, domains = mixed(number, conflict)
    opt.zero_grad()
    opt.backward(F.cross_entropy(model(x), y, reduction="none"), domains)
    opt.step()
