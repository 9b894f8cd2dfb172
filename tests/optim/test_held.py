"""Losses and statistics that are kept, for a plot, keep what they keep in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import RUNS, Net, Run, fishr, miro
from storages import Storages, held_by
from torch import Tensor, nn

import fastdg
from fastdg.gradients.graph import Graph

TERMS = 9 * 4  # a term's values of a batch live with its losses
CASES = {name: run for name, run in RUNS.items() if not name.startswith("ADIOS")} | {
    "Fishr, all layers, before the anneal": partial(
        Run, lambda o, m: fishr(o, params="all", anneal_steps=99)
    ),
    "Fishr, the first layer": partial(Run, lambda o, m: fishr(o, params=["body.weight"])),
    "IGA, weight 0": partial(Run, lambda o, m: fastdg.IGA(o, penalty_weight=0.0)),
    "IRM, weight 0": partial(Run, lambda o, m: fastdg.IRM(o, pre_anneal_weight=0.0)),
    "MIRO, weight 0": partial(Run, lambda o, m: fastdg.MIRO(o, m, layers=["body"], weight=0.0)),
    "PCGrad(MIRO), weight 0": partial(
        Run, lambda o, m: fastdg.PCGrad(fastdg.MIRO(o, m, layers=["body"], weight=0.0))
    ),
    "PCGrad(MIRO)": partial(Run, lambda o, m: fastdg.PCGrad(miro(o, m))),
}


def plain(losses: Tensor, domains: Tensor, **inputs: Any) -> Tensor:
    loss = losses.mean()
    loss.backward()
    return loss.detach()


def kept(run: Run, backward: Callable[..., Tensor]) -> tuple[int, list[Tensor]]:
    """Bytes that the losses of a step keep alive after it, and other tensors that it gave."""
    losses: list[Any] = []
    given: list[Tensor] = []

    def watched(own: Tensor, *args: Any, **inputs: Any) -> Tensor:
        losses.append(own)
        given.append(backward(own, *args, **inputs))
        return given[-1]

    run.opt.backward = watched
    with Storages() as storages:
        run.step()
    del run.opt.backward
    return held_by(storages, losses), given


@pytest.mark.parametrize("name", CASES)
def test_losses_keep_no_batch(name: str) -> None:
    """Before and after the anneal, if there is one: a batch is 216 bytes."""
    expected, _ = kept(Run(lambda o, m: o), plain)
    run = CASES[name]()
    for _ in range(2):
        run.step()
    terms = name.count("MIRO") * TERMS
    for steps in (5, 0):
        bytes_held, given = kept(run, run.opt.backward)
        assert bytes_held <= expected + terms
        for tensor in (*given, *run.opt.statistics.values()):
            assert tensor.grad_fn is None
            assert tensor.untyped_storage().nbytes() <= 8 * max(8, tensor.numel())
        for _ in range(steps):
            run.step()


@pytest.mark.parametrize("name", ["AgrSum", "PCGrad", "IGA", "Fishr", "VREx"])
def test_micro_batches_keep_no_batch(name: str) -> None:
    run = RUNS[name]()
    losses: list[Tensor] = []

    def halves(own: Tensor, domains: Tensor) -> Tensor:
        again = F.cross_entropy(run.model(run.x[:9]), run.y[:9], reduction="none")
        losses.extend((own, again))
        type(run.opt).backward(run.opt, again, domains, final=False)
        return type(run.opt).backward(run.opt, own, domains)

    run.step()
    run.opt.backward = halves
    with Storages() as storages:
        run.step()
    assert held_by(storages, losses) <= 2 * (9 + 1) * 4


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_closure_that_keeps_its_losses(weight: float) -> None:
    run = Run(lambda o, m: fastdg.IGA(o, penalty_weight=weight, num_domains=3))
    losses: list[Tensor] = []

    def closure(d: int) -> Tensor:
        rows = run.domains == d
        losses.append(F.cross_entropy(run.model(run.x[rows]), run.y[rows], reduction="none"))
        return losses[-1]

    run.opt.step(closure)
    losses.clear()
    with Storages() as storages:
        run.opt.step(closure)
    assert len(losses) == 6
    assert held_by(storages, losses) <= 6 * (18 + 1) * 4  # the losses, and the sum of weights


class Mixed(nn.Module):
    """Layers with a rule and without, with several outputs, and weights that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.lstm = nn.LSTM(16, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.body = nn.utils.parametrizations.weight_norm(nn.Linear(24, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        h = self.lstm(h.flatten(2))[0]
        h = self.attention(h, h, h)[0]
        return self.head(torch.tanh(self.body(h.flatten(1))))


FREEING: dict[str, Callable[..., Any]] = {
    "domain_moments": fastdg.domain_moments,
    "domain_gradients": fastdg.domain_gradients,
    "domain_gram": fastdg.domain_gram,
    "per_sample_norms": lambda tape, losses, d, **more: fastdg.per_sample_norms(
        tape, losses, **more
    ),
    "per_sample_gradients": lambda tape, losses, d, **more: fastdg.per_sample_gradients(
        tape, losses, **more
    ),
}


@pytest.mark.filterwarnings("ignore:.*take one call of autograd")
@pytest.mark.parametrize("params", ["all", "head"])
@pytest.mark.parametrize("name", FREEING)
@pytest.mark.parametrize("then", ["retain_graph=False", "a plain backward"])
def test_statistics_keep_no_batch(name: str, params: str, then: str) -> None:
    model, x, y, domains = (
        Mixed(),
        torch.randn(8, 2, 4, 4),
        torch.arange(8) % 3,
        torch.arange(8) % 2,
    )

    def forward() -> Tensor:
        return F.cross_entropy(model(x + torch.randn_like(x)), y, reduction="none")

    owners: list[Any] = []
    with Storages() as storages:
        owners.append(forward())
        owners[0].mean().backward()
    expected = held_by(storages, owners)
    with Storages() as storages:
        with fastdg.record(model, params) as tape:
            owners.append(forward())
        retain = then != "retain_graph=False"
        found = FREEING[name](tape, owners[0], domains, retain_graph=retain)
        if retain:
            owners[0].mean().backward()
        del found
    assert held_by(storages, owners) <= expected


@pytest.mark.parametrize("name", ["PCGrad", "Fishr", "VREx"])
def test_a_plain_backward_frees_what_a_wrapper_recorded(name: str) -> None:
    """As of a loss of which the wrapper was not asked."""
    run = RUNS[name]()
    owners: list[Any] = []
    with Storages() as storages:
        losses = F.cross_entropy(run.model(run.x), run.y, reduction="none")
        losses.mean().backward()
        owners.append(losses)
        del losses
    assert held_by(storages, owners) <= (54 + 1) * 4


@contextmanager
def suppress_freed() -> Iterator[None]:
    """Autograd's own words of a node that a backward has freed."""
    try:
        yield
    except RuntimeError as error:
        if "Trying to backward through the graph a second time" not in str(error):
            raise


def test_a_graph_that_is_freed_says_so() -> None:
    model: nn.Module = Net()
    with fastdg.record(model) as tape:
        losses = model(torch.randn(4, 6)).square().sum(1)
    fastdg.domain_gram(tape, losses, torch.arange(4) % 2, retain_graph=False)
    with pytest.raises(RuntimeError, match=r"second time|^losses: .*freed"):
        losses.mean().backward()
    assert losses.grad_fn is not None
    with pytest.raises(RuntimeError, match=r"^losses: .*freed"):
        for node in Graph(losses.grad_fn).nodes:  # the first layer's is among them
            if getattr(node, "_raw_saved_mat1", None) is not None:
                with suppress_freed():
                    node(torch.ones(4, node._input_metadata[0].shape[1]))  # type: ignore[attr-defined]
