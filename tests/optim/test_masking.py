"""What gradient masks promise, whatever the gradients are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from bases import batch, network, same, steps
from definitions import close, losses_of
from hypothesis import given, settings
from hypothesis import strategies as st
from surgeries import and_mask, rows_of, sand_mask, split, surgery, tables
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fastdg

thresholds = st.sampled_from([0.0, 0.2, 0.5, 0.75, 1.0])


@given(tables(), thresholds)
@settings(max_examples=40, deadline=None)
def test_the_mask_keeps_the_scale_of_each_parameter(g: Tensor, threshold: float) -> None:
    grad, opt = surgery(fastdg.ANDMask, g, threshold=threshold)
    if len(g) == 1:
        assert torch.equal(grad, g[0])
        return
    expected = torch.cat([part.flatten() for part in and_mask(split(g), threshold)])
    close(grad, expected)
    mask = (g.sign().mean(0).abs() >= threshold).double()
    close(opt.statistics["agreeing"], mask.mean())
    close(opt.statistics["agreeing_by_parameter"][1], mask[1:].mean())
    assert grad[mask == 0].eq(0).all()


@given(tables(least=2), thresholds.filter(lambda t: t < 1), st.sampled_from([1e-3, 0.5, 10.0]))
@settings(max_examples=40, deadline=None)
def test_the_soft_mask(g: Tensor, threshold: float, steepness: float) -> None:
    grad, _ = surgery(fastdg.SANDMask, g, threshold=threshold, steepness=steepness)
    rows = split(g)
    close(grad, torch.cat([part.flatten() for part in sand_mask(rows, threshold, steepness)]))


@pytest.mark.parametrize("cls", [fastdg.ANDMask, fastdg.SANDMask])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_relabelling_domains_changes_nothing(cls: Any, data: st.DataObject) -> None:
    g = data.draw(tables())
    order = torch.tensor(data.draw(st.permutations(range(len(g)))))
    grad, opt = surgery(cls, g, threshold=0.4)
    again, relabelled = surgery(cls, g, order, threshold=0.4)
    close(again, grad)
    for key, value in opt.statistics.items():
        got = relabelled.statistics[key]
        close(got[order] if key.startswith("domain") else got, value)


@pytest.mark.parametrize("domains", [1, 2, 3, 7, 16, 64])
def test_any_number_of_domains(domains: int) -> None:
    model = nn.Linear(9, 4).double()
    x, y = torch.randn(2 * domains, 9).double(), torch.randint(4, (2 * domains,))
    d = torch.cat([torch.arange(domains), torch.randint(domains, (domains,))])
    rows = rows_of(model, (x, y, d))
    for cls, rule, more in (
        (fastdg.ANDMask, and_mask, {"threshold": 0.25}),
        (fastdg.SANDMask, sand_mask, {"threshold": 0.25, "steepness": 1e-3}),
    ):
        opt = cls(SGD(model.parameters(), lr=0.1), **more)
        opt.backward(losses_of(model, x, y), d)
        expected = rule(rows, **more) if domains > 1 else rows[0]
        for p, one in zip(model.parameters(), expected, strict=True):
            close(p.grad, one)
        opt.zero_grad()


def test_one_threshold_for_each_end() -> None:
    """0 masks nothing; and what nobody agrees on is not divided by nothing."""
    g = torch.tensor([[1.0, 2.0, -1.0], [-2.0, 3.0, 0.0]])
    close(surgery(fastdg.ANDMask, g, threshold=0.0)[0], g.double().mean(0), 1e-9)
    grad, opt = surgery(fastdg.ANDMask, g)
    close(grad, torch.tensor([0.0, 5.0, 0.0]).double(), 1e-9)
    assert opt.statistics["agreeing_by_parameter"].tolist() == [0, 0.5]


def test_sand_mask_warns_once_that_nothing_moves() -> None:
    model = network()
    before = copy.deepcopy(model)
    opt = fastdg.SANDMask(Adam(model.parameters()))
    with pytest.warns(UserWarning, match=r"^threshold: .*SANDMask") as caught:
        opt.backward(*batch(model))
    assert [w.filename for w in caught] == [__file__]
    opt.step()
    steps(model, opt, range(2))
    same(model, before)
    opt.threshold = 0.5
    steps(model, opt, range(2))
    assert not torch.equal(model[0].weight, before[0].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, fastdg.SANDMask(Adam(model.parameters()), threshold=0.9), range(2))
        steps(model, fastdg.ANDMask(Adam(model.parameters())), range(2))


@pytest.mark.parametrize(
    ("cls", "more", "message"),
    [
        (fastdg.ANDMask, {"threshold": 1.5}, "^threshold: .*got 1.5"),
        (fastdg.ANDMask, {"threshold": "1"}, "^threshold: .*got '1'"),
        (fastdg.ANDMask, {"threshold": float("nan")}, "^threshold: .*got nan"),
        (fastdg.SANDMask, {"threshold": -0.1}, "^threshold: .*got -0.1"),
        (fastdg.SANDMask, {"steepness": 0}, "^steepness: .*got 0"),
        (fastdg.SANDMask, {"steepness": float("inf")}, "^steepness: .*got inf"),
        (fastdg.SANDMask, {"steepness": True}, "^steepness: .*got True"),
    ],
)
def test_bad_values(cls: Any, more: dict[str, Any], message: str) -> None:
    base = Adam(network().parameters())
    before = dict(base.param_groups[0])
    with pytest.raises(ValueError, match=message):
        cls(base, **more)
    assert base.param_groups[0].keys() == before.keys()
    opt = cls(base)
    ((name, value),) = more.items()
    held = getattr(opt, name)
    with pytest.raises(ValueError, match=message):
        setattr(opt, name, value)
    assert getattr(opt, name) == held
