"""Functions of differentiable statistics, and their derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from oracle import DOMAINS, NUM_DOMAINS
from torch import Tensor

import fastdg
from fastdg.gradients import engine


def penalty_of(losses: Tensor, params: Any) -> Tensor:
    """The sum of the squares of all means and variances."""
    moments = fastdg.domain_moments(
        losses, DOMAINS, params=params, num_domains=NUM_DOMAINS, create_graph=True
    )
    every = [*moments.variance.values(), *moments.mean.values()]
    return sum((m.square().sum() for m in every), torch.zeros(()))


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients by the leaves; zeros where there is none."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


def per_sample(losses: Tensor, p: Tensor) -> Tensor:
    """The gradients of ``p`` for each sample, with their graph."""
    found: list[Tensor] = []
    forward = engine.plan_gradients(losses, {"p": p})
    engine.collect(forward, lambda name, g: found.append(g.per_sample()), create_graph=True)
    return found[0]


def third(rows: Tensor, leaves: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Gradients of the gradients of per-sample gradients, which are derivatives themselves."""
    first = torch.autograd.grad(rows.square().sum(), leaves, create_graph=True)
    second = sum((g.square().sum() for g in first), torch.zeros(()))
    return list(torch.autograd.grad(second, [*leaves, x]))
