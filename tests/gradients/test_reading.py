"""Saved tensors that are not kept: activations computed again, or moved away."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdg
from fastdg.studies.experiments.memory import measured

BLOCKS = 3


class Count(nn.Module):
    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        Count.runs += 1
        return x


def network(blocks: int = BLOCKS) -> nn.ModuleList:
    torch.manual_seed(0)
    made = [
        nn.Sequential(
            Count(), *(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh()) for _ in range(4))
        )
        for _ in range(blocks)
    ]
    return nn.ModuleList([*made, nn.Linear(6, 3)]).double()


def run(model: nn.ModuleList, x: Tensor, how: str) -> Tensor:
    if how == "save_on_cpu":
        with save_on_cpu():
            return run(model, x, "plain")
    if how == "packed":
        with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return run(model, x, "plain")
    for block in list(model)[:-1]:
        x = checkpoint(block, x, use_reentrant=False) if how == "checkpoint" else block(x)
    return model[-1](x)


ALGORITHMS: dict[str, Any] = {
    "AgrSum": fastdg.AgrSum,
    "Fishr before its anneal": lambda base: fastdg.Fishr(base, params="all"),
    "Fishr": lambda base: fastdg.Fishr(base, params="all", anneal_steps=0),
    "IRM": fastdg.IRM,
}


@pytest.mark.parametrize("how", ["checkpoint", "save_on_cpu", "packed"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_steps_are_those_of_the_plain_model(name: str, how: str) -> None:
    model = network()
    twin = copy.deepcopy(model)
    x, y, d = torch.randn(8, 6).double(), torch.arange(8) % 3, torch.arange(8) % 2
    for net, way in ((model, how), (twin, "plain")):
        opt = ALGORITHMS[name](torch.optim.SGD(net.parameters(), lr=0.1))
        for _ in range(3):
            opt.zero_grad()
            opt.backward(F.cross_entropy(run(net, x, way), y, reduction="none"), d)
            opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_checkpoint_runs_again_once_for_its_backward_and_once_for_its_reader() -> None:
    model = network()
    opt = fastdg.AgrSum(torch.optim.SGD(model.parameters(), lr=0.1))
    x, y, d = torch.randn(8, 6).double(), torch.arange(8) % 3, torch.arange(8) % 2
    for step in range(3):
        opt.zero_grad()
        losses = F.cross_entropy(run(model, x, "checkpoint"), y, reduction="none")
        Count.runs = 0
        opt.backward(losses, d)
        assert step < 2 or Count.runs <= 2 * BLOCKS


@pytest.mark.cpu("memory of the CPU")
def test_a_step_holds_one_checkpoint_s_activations_at_a_time() -> None:
    held = {}
    x, y, d = torch.randn(999, 6).double(), torch.arange(999) % 3, torch.arange(999) % 2

    def step(model: nn.ModuleList, opt: Any, how: str) -> None:
        opt.zero_grad()
        opt.backward(F.cross_entropy(run(model, x, how), y, reduction="none"), d)

    for how in ("plain", "checkpoint"):
        model = network(blocks=9)
        opt = fastdg.AgrSum(torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(2):
            step(model, opt, how)
        _, held[how] = measured(partial(step, model, opt, how))
    assert held["checkpoint"] < 0.5 * held["plain"]
