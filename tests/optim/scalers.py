"""Training with and without a ``torch.amp.GradScaler``, for each wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from bases import WRAPS, Wrap, batch, model_of, network
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Adam, Optimizer

import fastdg

WRAPPERS: dict[str, Wrap] = {
    **WRAPS,
    "Fishr-all": lambda base: WRAPS["Fishr"](base, params="all"),
    "SWAD(AgrRand(MIRO))": lambda base: fastdg.SWAD(
        fastdg.AgrRand(WRAPS["MIRO"](base), generator=torch.Generator().manual_seed(3)),
        model_of(base),
    ),
}
MAKES = {
    "foreach": lambda p: Adam(p, lr=1e-2, foreach=True),
    "fused": lambda p: Adam(p, lr=1e-2, fused=True),
}
STEPS = 5  # past the anneal of those that have one
Forward = Callable[[nn.Module, int], tuple[Tensor, Tensor]]


def start(wrap: Wrap, make: Callable[[Any], Optimizer] = MAKES["foreach"]) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model = network()
    return model, wrap(make(model.parameters()))


def train(
    model: nn.Module,
    opt: Any,
    seeds: Iterable[int],
    scaler: GradScaler | None = None,
    clip: float | None = None,
    forward: Forward = batch,
) -> None:
    """Steps on two micro-batches each."""
    for seed in seeds:
        opt.zero_grad()
        opt.backward(*forward(model, 2 * seed), final=False, scaler=scaler)
        opt.backward(*forward(model, 2 * seed + 1), scaler=scaler)
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(opt)
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > clip
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()


def alike(one: Any, other: Any) -> None:
    """Equal to the last bit, NaN where the other is."""
    if isinstance(one, Tensor):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            alike(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            alike(a, b)
    else:
        assert one == other


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])
