"""A training loop over batches of one domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from definitions import MAKES, batches, losses_of, parts
from torch import Tensor, nn
from torch.optim import SGD

import fastdg

Round = Sequence[tuple[Tensor, Tensor]]


def rounds(count: int, dtype: torch.dtype = torch.float64) -> list[Round]:
    """A batch of each of three domains, of other sizes each time."""
    data = batches(count, absent=False)
    return [[(x.to(dtype), y) for _, x, y in parts(batch)] for batch in data]


def wrapped(model: nn.Module, make: str = "adam", **more: Any) -> fastdg.Fish:
    return fastdg.Fish(MAKES[make](model), **{"num_domains": 3, "model": model, **more})


def inner(opt: fastdg.Fish, model: nn.Module, x: Tensor, y: Tensor, d: int) -> Tensor:
    opt.zero_grad()
    loss = opt.backward(losses_of(model, x, y), torch.full_like(y, d))
    opt.step()
    return loss


def run(opt: fastdg.Fish, model: nn.Module, data: Sequence[Round]) -> None:
    for domains in data:
        for d, (x, y) in enumerate(domains):
            inner(opt, model, x, y, d)


def linear(**more: Any) -> tuple[nn.Module, fastdg.Fish]:
    model = nn.Linear(4, 3)
    return model, fastdg.Fish(SGD(model.parameters(), lr=0.1), **{"num_domains": 2, **more})


def one(model: nn.Module, opt: fastdg.Fish, domain: int = 0) -> None:
    inner(opt, model, torch.randn(5, 4), torch.arange(5) % 3, domain)
