"""What is remembered of a graph, what is looked for again, and what a zero gradient may hide."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from oracle import DOMAINS, SLOW, assert_close, assert_statistics, one_by_one, trainable
from torch import Tensor, nn

import fastdg
from fastdg.gradients import engine, planner

N = 6


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of outputs that each probe looks at; no plan is remembered before."""
    seen: list[int] = []
    probe = planner.probe

    def counted(losses: Tensor, graph: object, outputs: list[object]) -> object:
        seen.append(len(outputs))
        return probe(losses, graph, outputs)  # type: ignore[arg-type]

    monkeypatch.setattr(planner, "probe", counted)
    monkeypatch.setattr(engine, "_plans", OrderedDict())
    return seen


class Model(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


def norms(model: nn.Module, samples: int = N) -> None:
    """Per-sample norms of a batch that is new, compared with autograd's."""
    losses = model(torch.randn(samples, 4)).square().flatten(1).sum(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SLOW, UserWarning)
        got = fastdg.per_sample_norms(losses, params=model)
    flat = [g.flatten(1) for g in one_by_one(losses, trainable(model)).values()]
    assert_close(got, torch.cat(flat, 1).norm(dim=1), "norms")


def steps_that_probe(step: Callable[[], object], probes: list[int], steps: int) -> list[int]:
    found = []
    for k in range(1, steps + 1):
        probes.clear()
        step()
        if probes:
            found.append(k)
    return found


def test_a_graph_is_probed_in_steps_1_2_4_8(probes: list[int]) -> None:
    model = Model()
    assert steps_that_probe(lambda: norms(model), probes, 17) == [1, 2, 4, 8, 16]


def test_another_size_is_another_graph(probes: list[int]) -> None:
    model = Model()
    for _ in range(3):
        norms(model)
    assert steps_that_probe(lambda: norms(model, 5), probes, 4) == [1, 2, 4]
    assert steps_that_probe(lambda: norms(model), probes, 2) == [1]  # the fourth of that size


def test_a_frozen_parameter_makes_another_graph(probes: list[int]) -> None:
    model = Model()
    for _ in range(3):
        norms(model)
    model.one.weight.requires_grad_(False)
    assert steps_that_probe(lambda: norms(model), probes, 1) == [1]


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h[h[:, 0].argsort()],
        lambda h: h.gather(0, h.argsort(0)),
        lambda h: h.new_zeros(len(h), 4).index_add(0, h[:, 0].argsort(), h),
        lambda h: torch.eye(len(h))[h[:, 0].argsort()] @ h,
        lambda h: h.sort(0).values,
    ],
    ids=["index", "gather", "index_add", "matrix", "sort"],
)
def test_rows_chosen_by_values_are_looked_for_each_time(
    between: Callable[[Tensor], Tensor], probes: list[int]
) -> None:
    model = Model(between)
    assert steps_that_probe(lambda: norms(model), probes, 5) == [1, 2, 3, 4, 5]


def test_rows_chosen_in_the_losses_are_looked_for_each_time(probes: list[int]) -> None:
    """The permutation lies above every layer."""
    model = Model()

    def step() -> None:
        order = torch.randperm(N)
        losses = model(torch.randn(N, 4))[order].square().sum(1)
        got = fastdg.per_sample_gradients(losses, params=model)
        for name, g in one_by_one(losses, trainable(model)).items():
            assert_close(got[name], g, name)

    assert steps_that_probe(step, probes, 5) == [1, 2, 3, 4, 5]


def test_what_is_above_a_choice_is_remembered(probes: list[int]) -> None:
    """Only the parameters below it have rows that may move."""
    model = Model(lambda h: h[h[:, 0].argsort()])

    def step() -> None:
        losses = model(torch.randn(N, 4)).square().sum(1)
        fastdg.per_sample_norms(losses, params=list(model.two.parameters()))

    assert steps_that_probe(step, probes, 5) == [1, 2, 4]


def test_a_branch_that_is_zero_at_first(probes: list[int]) -> None:
    """Its samples are not known until it has a gradient, and found then."""
    model, gate = Model(lambda h: (h.transpose(0, 1) * gate[0]).transpose(0, 1)), [0.0]

    def step() -> None:
        norms(model)

    assert 1 in steps_that_probe(step, probes, 2)
    for value in (1.0, 0.0, 0.5):
        gate[0] = value
        for _ in range(4):
            step()


@pytest.mark.parametrize("first", [1.0, 0.0])
def test_a_step_of_zeros_leaves_what_is_known(first: float) -> None:
    model = Model(lambda h: h.unsqueeze(0).expand(2, -1, -1).sum(0))
    for weight in (first, first, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0):
        losses = model(torch.randn(N, 4)).square().sum(1) * weight
        got = fastdg.per_sample_gradients(losses, params=model)
        for name, g in one_by_one(losses, trainable(model)).items():
            assert_close(got[name], g, name)


def test_derivatives_of_gradients_that_are_zero() -> None:
    """A head of zeros: the gradients below it are zero, their derivatives by the head are not."""
    model = Model()
    nn.init.zeros_(model.two.weight)
    x = torch.randn(N, 4)

    def losses_of(m: nn.Module) -> Tensor:
        return (m(x) - 1).square().sum(1) + m.one(x).square().sum(1)

    assert_statistics(model, losses_of, slow=True)
    nested = Model(lambda h: nn.functional.linear(h.tanh(), model.one.weight).tanh())
    nested.one = model.one
    nn.init.zeros_(nested.two.weight)
    assert_statistics(nested, losses_of, slow=True)


def test_no_more_plans_than_so_many_are_remembered(probes: list[int]) -> None:
    model = nn.Linear(4, 1)
    for samples in range(2, 2 + engine.MOST_PLANS + 5):
        losses = model(torch.randn(samples, 4)).square().sum(1)
        fastdg.per_sample_norms(losses, params=model)
    assert len(engine._plans) == engine.MOST_PLANS


def test_a_plan_serves_another_model_of_the_same_shape(probes: list[int]) -> None:
    one, two = Model(), Model()
    for _ in range(3):
        norms(one)
    probes.clear()
    norms(two)  # the fourth of that graph
    assert len(probes) == 1
    probes.clear()
    norms(two)
    norms(one)
    assert not probes


def test_a_training_step_costs_no_probe(probes: list[int]) -> None:
    model = Model()
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all")

    def step() -> None:
        opt.zero_grad()
        opt.backward(model(torch.randn(N, 4)).square().sum(1), DOMAINS)
        opt.step()

    assert steps_that_probe(step, probes, 9) == [1, 2, 4, 8]
