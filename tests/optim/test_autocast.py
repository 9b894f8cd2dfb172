"""``opt.backward`` in an autocast block is ``opt.backward`` after it, on every backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from on_device import DEVICE
from scalers import WRAPPERS, alike, flat, start
from torch import Tensor, nn

import fastdg

BACKENDS = [name for name, (there, _) in fastdg.backends().items() if there]
ALL = {
    **WRAPPERS,
    "Fishr-all, annealed": lambda base: fastdg.Fishr(
        base, params="all", anneal_steps=0, penalty_weight=5.0
    ),
}


def losses_of(model: nn.Module, seed: int, autocast: bool) -> tuple[Tensor, Tensor]:
    """The forward in autocast, or not: then its products are those of float32."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(9, 4, generator=generator), torch.randint(3, (9,), generator=generator)
    domains = torch.randint(3, (9,), generator=generator)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        return F.cross_entropy(model(x), y, reduction="none"), domains


@pytest.mark.product
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forward", ["autocast", "float32"])
@pytest.mark.parametrize("name", ALL)
def test_backward_in_the_block(name: str, forward: str, backend: str) -> None:
    results = []
    for inside in (False, True):
        model, opt = start(ALL[name])
        with fastdg.use_backend(backend):
            for seed in range(4):
                losses, domains = losses_of(model, seed, forward == "autocast")
                opt.zero_grad()
                with torch.autocast(DEVICE, torch.bfloat16, enabled=inside):
                    first = opt.backward(losses, domains, final=False)
                    losses, domains = losses_of(model, seed + 10, forward == "autocast")
                    mean = opt.backward(losses, domains)
                results.append([first, mean, flat(p.grad for p in model.parameters())])
                opt.step()
        results.append([flat(model.parameters())])
    half = len(results) // 2
    alike(results[:half], results[half:])


STATISTICS: dict[str, Callable[[fastdg.Tape, Tensor, Tensor], object]] = {
    "domain_moments": lambda *args: vars(fastdg.domain_moments(*args)),
    "domain_gradients": fastdg.domain_gradients,
    "domain_gram": fastdg.domain_gram,
    "per_sample_gradients": lambda tape, losses, domains: fastdg.per_sample_gradients(tape, losses),
    "per_sample_norms": lambda tape, losses, domains: fastdg.per_sample_norms(tape, losses),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_in_the_block(name: str, backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    found = []
    for inside in (False, True):
        with fastdg.record(model) as tape:
            losses, domains = losses_of(model, 0, False)
        with fastdg.use_backend(backend), torch.autocast(DEVICE, torch.bfloat16, enabled=inside):
            found.append(torch.utils._pytree.tree_leaves(STATISTICS[name](tape, losses, domains)))
    alike(*found)
