"""``retain_graph=True``: the graph of the losses serves a further backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import network
from torch import Tensor, nn
from torch.optim import SGD

import fastdg

KINDS: dict[str, Callable[[Any], Any]] = {
    "ERM": fastdg.ERM,
    "Fishr-head": lambda base: fastdg.Fishr(base, anneal_steps=0),
    "Fishr-all": lambda base: fastdg.Fishr(base, anneal_steps=0, params="all"),
    "Fishr-anneal": lambda base: fastdg.Fishr(base, params="all"),  # one backward for all of it
    "IGA": lambda base: fastdg.IGA(base, penalty_weight=2.0),
    "IRM": lambda base: fastdg.IRM(base, anneal_steps=0),
    "VREx": lambda base: fastdg.VREx(base, anneal_steps=0),
    "GroupDRO": fastdg.GroupDRO,
    "PCGrad": lambda base: fastdg.PCGrad(base, generator=torch.Generator()),
    "AgrSum": fastdg.AgrSum,
    "CAGrad": fastdg.CAGrad,
    "EQRM": lambda base: fastdg.EQRM(base, anneal_steps=0),
    "Fish": lambda base: fastdg.Fish(base, num_domains=2),
    "PGrad": lambda base: fastdg.PGrad(base, num_domains=2),
    "GENIE-batch": lambda base: fastdg.GENIE(base, variance="batch"),
    "CausIRL": lambda base: fastdg.CausIRL(base, generator=torch.Generator()),
    "SAM": fastdg.SAM,
    "MLDG": lambda base: fastdg.MLDG(base, num_domains=3),
    "SMA": None,  # takes the model
    "SWAD": None,
}
ONE_DOMAIN = {"Fish", "PGrad", "MLDG"}
ASCENTS = {"SAM", "MLDG"}  # the first backward of a step


def losses_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    logits = model(x)
    return F.cross_entropy(logits, torch.arange(12) % 3, reduction="none"), logits


def wrapped(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = network(torch.float64)
    base = SGD(model.parameters(), lr=0.1)
    make = KINDS[name]
    return model, getattr(fastdg, name)(base, model) if make is None else make(base)


def given(name: str, logits: Tensor) -> dict[str, Tensor]:
    return {"features": logits} if name == "CausIRL" else {}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_another_loss_takes_the_same_graph(name: str, micro: int) -> None:
    domains = torch.zeros(12).long() if name in ONE_DOMAIN else torch.arange(12) % 3
    flats = []
    for retain in (False, True):
        model, opt = wrapped(name)
        kept = []
        for nr in range(micro):
            losses, logits = losses_of(model)
            more = given(name, logits)
            opt.backward(losses, domains, nr == micro - 1, retain_graph=retain, **more)
            kept.append((losses, logits))
        flats.append(flat(model))
    torch.testing.assert_close(flats[1], flats[0], rtol=0, atol=0)

    others = list(model.parameters())
    for losses, logits in kept:
        before = flat(model)
        aux = logits.square().mean() + losses.mean()
        expected = torch.autograd.grad(aux, others, retain_graph=True)
        aux.backward()
        added = torch.cat([grad.flatten() for grad in expected])
        torch.testing.assert_close(flat(model), before + added, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ASCENTS])
def test_the_same_losses_again(name: str) -> None:
    model, opt = wrapped(name)
    domains = torch.zeros(12).long() if name in ONE_DOMAIN else torch.arange(12) % 3
    losses, logits = losses_of(model)
    more, state = given(name, logits), opt.state_dict()
    opt.backward(losses, domains, retain_graph=True, **more)
    first = flat(model)
    opt.zero_grad()
    opt.load_state_dict(state)
    opt.backward(losses, domains, **more)
    assert flat(model).allclose(first, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match=r"^losses: |backward through the graph a second time"):
        opt.backward(losses, domains, **more)


@pytest.mark.filterwarnings("ignore:params. .*one call of autograd for each domain")
def test_losses_of_tasks_again() -> None:
    torch.manual_seed(0)
    model = network(torch.float64)
    opt = fastdg.PCGrad(SGD(model.parameters(), lr=0.1), generator=torch.Generator())
    losses, logits = losses_of(model)
    tasks = [losses, logits.square().mean(1)]
    opt.backward(tasks, retain_graph=True)
    first = flat(model)
    opt.zero_grad()
    opt.backward(tasks)
    assert flat(model).allclose(first, rtol=1e-12, atol=1e-12)
