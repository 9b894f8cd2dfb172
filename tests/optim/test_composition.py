"""Terms in terms, and what algorithms around them do not know of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import MAKES, Net, alike, batches, close, net
from torch import Tensor
from torch.optim import Optimizer

import fastdg

LAYERS = ["conv", "down"]


def miro(base: Optimizer, model: Net) -> fastdg.MIRO:
    return fastdg.MIRO(base, model, layers=LAYERS)


def rise(base: Optimizer, model: Net) -> fastdg.RISE:
    generator = torch.Generator().manual_seed(1)
    classes = torch.randn(3, 5, generator=generator).double()
    anchors = torch.randn(3, 2, 5, generator=generator).double()
    return fastdg.RISE(base, model.scale, classes, anchors, distillation=0.0)


def step(opt: Any, model: Net, x: Tensor, y: Tensor, d: Tensor, **inputs: Any) -> None:
    opt.zero_grad()
    opt.backward(F.cross_entropy(model(x), y, reduction="none"), d, **inputs)
    opt.step()


@pytest.mark.parametrize(
    "around", [lambda o, m: o, lambda o, m: fastdg.Fishr(o), lambda o, m: fastdg.AgrSum(o)]
)
def test_terms_in_terms(around: Any) -> None:
    """In either order, under anything, and with SWAD outside: the same steps and statistics."""
    first = net()
    second = copy.deepcopy(first)
    one = around(miro(rise(MAKES["momentum"](first), first), first), first)
    two = fastdg.SWAD(around(rise(miro(MAKES["momentum"](second), second), second), second), second)
    for x, y, d in batches(3):
        step(one, first, x, y, d, labels=y)
        step(two, second, x, y, d, labels=y)
        assert one.statistics.keys() == two.statistics.keys()
        for key, value in one.statistics.items():
            close(two.statistics[key].double().nan_to_num(), value.double().nan_to_num(), 1e-11)
    alike(second, first, 1e-11)
    assert {"miro", "rise_absolute", "rise_relative", "objective"} <= one.statistics.keys()


def test_the_objective_is_the_sum_of_its_parts() -> None:
    model, ((x, y, d),) = net(), batches(1, absent=False)
    opt = fastdg.Fishr(miro(rise(MAKES["adam"](model), model), model), pre_anneal_weight=2.0)
    step(opt, model, x, y, d, labels=y)
    seen, term = opt.statistics, opt.base.base
    parts = term.absolute * seen["rise_absolute"] + term.relative * seen["rise_relative"]
    close(seen["objective"], seen["loss"] + 2 * seen["penalty"] + 0.1 * seen["miro"] + parts)


def test_inputs_find_the_term_that_takes_them() -> None:
    model, ((x, y, d),) = net(), batches(1)
    opt = fastdg.VREx(miro(rise(MAKES["adam"](model), model), model))
    with pytest.raises(TypeError, match=r"^label: VREx.backward .*Did you mean labels=\?"):
        step(opt, model, x, y, d, label=y)
    with pytest.raises(TypeError, match=r"^labels: RISE needs"):
        step(opt, model, x, y, d)
    opt.step(lambda: (F.cross_entropy(model(x), y, reduction="none"), d, {"labels": y}))
    assert opt.steps == opt.base.steps == opt.base.base.steps == 1


def test_irm_and_rise_take_the_same_logits() -> None:
    model, ((x, y, d),) = net(), batches(1, absent=False)
    opt = fastdg.IRM(rise(MAKES["adam"](model), model), anneal_steps=0)
    for _ in range(2):
        logits = model(x)
        opt.zero_grad()
        losses = F.cross_entropy(logits, y, reduction="none")
        opt.backward(losses, d, logits=logits, labels=y)
        opt.step()
    assert opt.statistics["objective"].isfinite()


def test_fish_takes_its_steps_with_terms() -> None:
    model = net()
    twin = copy.deepcopy(model)
    ((x, y, d),) = batches(1, absent=False)

    def closure(domain: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rows = d == domain
        losses = F.cross_entropy(model(x[rows]), y[rows], reduction="none")
        return losses, d[rows], {"labels": y[rows]}

    opt = fastdg.Fish(rise(miro(MAKES["adam"](model), model), model), num_domains=3)
    other = fastdg.Fish(rise(miro(MAKES["adam"](twin), twin), twin), num_domains=3)
    opt.step(closure)
    for domain in range(3):
        rows = d == domain
        step(other, twin, x[rows], y[rows], d[rows], labels=y[rows])
    alike(model, twin)
    assert opt.steps == other.steps == 3


def test_iga_cannot_ask_twice_with_a_term() -> None:
    model, ((x, y, d),) = net(), batches(1, absent=False)
    opt = fastdg.IGA(miro(MAKES["adam"](model), model), num_domains=3, penalty_weight=0.1)

    def closure(domain: int) -> Tensor:
        rows = d == domain
        return F.cross_entropy(model(x[rows]), y[rows], reduction="none")

    with pytest.raises(ValueError, match=r"^closure: .*MIRO"):
        opt.step(closure)
    step(opt, model, x, y, d)
    assert opt.steps == 1
