"""GGA-L against a backward for each domain and one of the whole batch, in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from bases import seeded
from definitions import MAKES, alike, batches, close, losses_of, net
from surgeries import rows_of, surgery
from torch import Tensor
from torch.optim import SGD

import fastdg


def similarity(rows: list[Tensor]) -> Tensor:
    found = [torch.cosine_similarity(a, b, 0) for a, b in itertools.combinations(rows, 2)]
    return torch.stack(found).mean() if found else torch.ones(()).double()


@pytest.mark.parametrize("noise", ["normal", "uniform"])
@pytest.mark.parametrize("make", MAKES)
def test_definition(make: str, noise: str) -> None:
    """Over ragged domains, some of them absent; the noise in the order of the parameters."""
    model = net()
    twin = copy.deepcopy(model)
    opt = fastdg.GGAL(MAKES[make](model), gamma=0.1, noise=noise, num_domains=3, generator=seeded())
    base, generator = MAKES[make](twin), seeded()
    draw = torch.randn if noise == "normal" else torch.rand
    for batch in batches(6):
        rows = [torch.cat([g.flatten() for g in row]) for row in rows_of(twin, batch)]
        sigma = 0.1 * (1 - similarity(rows))
        base.zero_grad()
        losses_of(twin, *batch[:2]).mean().backward()
        for p in twin.parameters():
            p.grad += sigma * draw(p.shape, generator=generator, dtype=p.dtype)
        base.step()
        opt.zero_grad()
        opt.backward(losses_of(model, *batch[:2]), batch[2])
        opt.step()
        close(opt.statistics["sigma"], sigma)
        close(opt.statistics["similarity"], similarity(rows))
        alike(model, twin)


@pytest.mark.parametrize("readable", [True, False])
def test_gradients_of_zeros_and_domains_that_are_absent(
    readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's cosine has it, 0; what has no samples is in no pair."""
    if not readable:
        monkeypatch.setattr("fastdg.core.combine.combiner.readable", lambda domains: False)
    g = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0], [4.0, 3.0, 0.0]])
    _, opt = surgery(fastdg.GGAL, g, torch.tensor([0, 1, 3]), num_domains=5)
    close(opt.statistics["similarity"], torch.tensor(24 / 25 / 3).double(), 1e-7)


def test_one_domain_has_no_noise() -> None:
    g = torch.randn(1, 6)
    grad, opt = surgery(fastdg.GGAL, g, gamma=10.0)
    close(grad, g[0].double())
    assert opt.statistics["sigma"] == 0


def test_no_noise_is_plain_training() -> None:
    g = torch.randn(4, 6)
    grad, _ = surgery(fastdg.GGAL, g, torch.tensor([0, 0, 1, 1]), gamma=0.0)
    close(grad, g.double().mean(0))


@pytest.mark.parametrize(("argument", "value"), [("gamma", -1), ("noise", "laplace")])
def test_arguments(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}: .*got "):
        fastdg.GGAL(SGD(torch.nn.Linear(2, 2).parameters(), 0.1), **{argument: value})
