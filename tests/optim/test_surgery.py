"""What gradient surgery promises, whatever the gradients are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from bases import seeded
from definitions import close, losses_of
from hypothesis import given, settings
from hypothesis import strategies as st
from surgeries import (
    CASES,
    DRAWING,
    Rule,
    agr_sum,
    gram_rule,
    inverse_norms,
    pcgrad,
    rows_of,
    split,
    surgery,
    tables,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fastdg
from fastdg.algorithms.pcgrad import projected


@given(tables())
@settings(max_examples=40, deadline=None)
def test_agreement_has_the_common_sign(g: Tensor) -> None:
    grad, opt = surgery(fastdg.AgrSum, g)
    common = (g.sign() == g[0].sign()).all(0) & (g[0] != 0)
    assert torch.equal(grad.sign(), torch.where(common, g[0].sign(), 0.0))
    close(grad, torch.where(common, g.mean(0), 0.0))
    agreeing = common.double() if len(g) > 1 else torch.ones(g.shape[1])
    close(opt.statistics["agreeing"], agreeing.mean())
    close(opt.statistics["agreeing_by_parameter"][0], agreeing[0])
    close(opt.statistics["agreeing_by_parameter"][1], agreeing[1:].mean())


@given(tables(least=2, most=2))
@settings(max_examples=40, deadline=None)
def test_pcgrad_of_two_domains_leaves_no_conflict(g: Tensor) -> None:
    grad, opt = surgery(fastdg.PCGrad, g)
    for row in g:
        assert float(grad @ row) >= -1e-12 * float(row.square().sum().clamp(min=1))
    assert int(opt.statistics["conflicts"]) == int(g[0] @ g[1] < 0)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("name", ["AgrSum", "AgrRand", "PCGrad", "GramSurgery"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_relabelling_domains_changes_nothing(name: str, data: st.DataObject) -> None:
    g = data.draw(tables(most=2 if name == "PCGrad" else 6))
    order = torch.tensor(data.draw(st.permutations(range(len(g)))))
    more = {"weighting": inverse_norms} if name == "GramSurgery" else {}
    if name in DRAWING:
        more["generator"] = seeded()
    grad, opt = surgery(getattr(fastdg, name), g, **more)
    if name in DRAWING:
        more["generator"] = seeded()
    again, relabelled = surgery(getattr(fastdg, name), g, order, **more)
    close(again, grad)
    statistics = relabelled.statistics
    close(statistics["domain_loss"][order], opt.statistics["domain_loss"])
    if "gram" in statistics:
        close(statistics["gram"][order][:, order], opt.statistics["gram"])
        close(statistics["weights"][order], opt.statistics["weights"])


@pytest.mark.parametrize("shared_order", [False, True])
@pytest.mark.parametrize("domains", [1, 2, 3, 7, 16, 33, 64])
def test_any_number_of_domains(domains: int, shared_order: bool) -> None:
    model = nn.Linear(9, 4).double()
    x, y = torch.randn(2 * domains, 9).double(), torch.randint(4, (2 * domains,))
    d = torch.cat([torch.arange(domains), torch.randint(domains, (domains,))])
    rows = rows_of(model, (x, y, d))
    rules: dict[Any, Rule] = {
        fastdg.AgrSum: agr_sum,
        fastdg.PCGrad: lambda rows: pcgrad(rows, seeded(), shared_order=shared_order),
        fastdg.GramSurgery: lambda rows: gram_rule(rows, inverse_norms),
    }
    more: dict[Any, Any] = {
        fastdg.AgrSum: {},
        fastdg.PCGrad: {"generator": seeded(), "shared_order": shared_order},
        fastdg.GramSurgery: {"weighting": inverse_norms},
    }
    for cls, rule in rules.items():
        opt = cls(SGD(model.parameters(), lr=0.1), **more[cls])
        opt.backward(losses_of(model, x, y), d)
        for p, expected in zip(model.parameters(), rule(rows), strict=True):
            close(p.grad, expected)
        opt.zero_grad()


def test_pcgrad_in_gram_space_is_the_pair_loop() -> None:
    """Every order of four gradients, one of them zero."""
    g = torch.randn(4, 5).double()
    g[2] = 0
    for order in itertools.permutations(range(4)):
        expected = []
        for i in range(4):
            mine = g[i].clone()
            for j in order:
                if j != i and mine @ g[j] < 0:
                    mine -= mine @ g[j] / (g[j] @ g[j]) * g[j]
            expected.append(mine)
        coefficients = projected(g @ g.t(), torch.tensor(order).repeat(4, 1))
        close(coefficients @ g, torch.stack(expected))


def test_statistics_of_the_gram_matrix() -> None:
    g = torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    _, opt = surgery(fastdg.PCGrad, g, torch.tensor([0, 2, 3, 4]), num_domains=6)
    s = opt.statistics
    gram = torch.zeros(6, 6).double()
    gram[0, 0], gram[2, 2], gram[3, 3] = 25.0, 4.0, 2.0
    gram[0, 3] = gram[3, 0] = -3.0
    gram[2, 3] = gram[3, 2] = -2.0
    close(s["gram"], gram)
    assert int(s["conflicts"]) == 2
    assert float(s["cosine"][0, 3]) == pytest.approx(-3 / (5 * 2**0.5), abs=1e-15)
    nothing = torch.tensor([False, True, False, False, True, True])
    assert torch.equal(s["cosine"].isnan(), nothing | nothing.unsqueeze(1))
    assert torch.equal(s["weights"] == 0, torch.tensor([0, 1, 0, 0, 0, 1]).bool())
    assert s["domain_count"].tolist() == [1, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("name", ["AgrSum", "AgrRand", "PCGrad"])
def test_nothing_agrees(name: str) -> None:
    g = torch.tensor([[1.0, 0.0, -2.0], [-1.0, 3.0, 2.0]])
    grad, opt = surgery(getattr(fastdg, name), g)
    if name == "PCGrad":  # all that is left is what the other domain does not mind
        assert float(grad @ g[0].double()) >= -1e-12
        return
    assert grad.eq(0).all()
    assert float(opt.statistics["agreeing"]) == 0
    assert name == "AgrSum" or float(opt.statistics["sigma"]) == 0


def test_noise_where_the_signs_disagree() -> None:
    g = torch.randn(2, 20_000)
    grad, opt = surgery(fastdg.AgrRand, g, generator=seeded())
    agreed = g[0].sign() == g[1].sign()
    close(grad[agreed], g.double().mean(0)[agreed])
    sigma = grad[agreed].abs().mean()
    close(opt.statistics["sigma"], sigma)
    noise = grad[~agreed] / sigma
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05


def test_reduction_is_a_scale() -> None:
    g = torch.randn(3, 6)
    for name in ("AgrSum", "AgrRand", "PCGrad"):
        more = [{"generator": seeded()} if name in DRAWING else {} for _ in range(2)]
        mean = surgery(getattr(fastdg, name), g, **more[0])[0]
        total = surgery(getattr(fastdg, name), g, reduction="sum", **more[1])[0]
        close(total, 3 * mean)


@pytest.mark.parametrize("name", ["AgrRand", "PCGrad", "PCGrad-shared"])
def test_without_a_generator_torch_s_own_is_drawn_from(name: str) -> None:
    wrap, rule = CASES[name]
    g = torch.randn(4, 50)

    def grad(seed: int, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        return surgery(wrap, g, **more)[0]

    assert torch.equal(grad(1, generator=None), grad(1, generator=None))
    assert not torch.equal(grad(1, generator=None), grad(2, generator=None))
    assert torch.equal(grad(1), grad(2))
    close(surgery(wrap, g)[0], torch.cat([t.flatten() for t in rule()(split(g))]))


def test_a_state_without_a_generator_to_load_it() -> None:
    def make(**more: Any) -> Any:
        return fastdg.PCGrad(Adam(nn.Linear(2, 2).parameters()), **more)

    state = make(generator=seeded()).state_dict()
    with pytest.raises(ValueError, match=r"^state_dict: .*generator"):
        make().load_state_dict(state)
    generator = torch.Generator()
    make(generator=generator).load_state_dict(state)
    assert torch.equal(generator.get_state(), seeded().get_state())
    state["param_groups"][0]["pcgrad_generator"] = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^state_dict: .*'cpu'"):
        make(generator=seeded()).load_state_dict(state)
    generator = seeded().manual_seed(11)
    make(generator=generator).load_state_dict(make().state_dict())  # it goes on from where it is
    assert generator.initial_seed() == 11


def test_a_generator_that_the_user_moves() -> None:
    opt = fastdg.AgrRand(Adam(nn.Linear(2, 2).parameters()), generator=seeded())
    opt.generator.manual_seed(3)
    state = opt.state_dict()["param_groups"][0]["agrrand_generator"]
    assert torch.equal(state, torch.Generator().manual_seed(3).get_state())


def test_weightings_see_the_domains_of_the_batch() -> None:
    seen: list[Tensor] = []

    def weighting(gram: Tensor) -> Tensor:
        seen.append(gram.clone())
        return torch.tensor([2.0, -1.0])

    g = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    domains = torch.tensor([3, 1])
    settings: dict[str, Any] = {"weighting": weighting, "num_domains": 5}
    grad, opt = surgery(fastdg.GramSurgery, g, domains, **settings)
    close(grad, -g[0].double() + 2 * g[1].double())
    close(seen[0], torch.tensor([[25.0, 11.0], [11.0, 5.0]]).double())
    assert opt.statistics["weights"].tolist() == [0, 2, 0, -1, 0]
    grad, opt = surgery(fastdg.GramSurgery, g, torch.tensor([1, 1]), **settings)
    close(grad, g.double().mean(0))
    assert len(seen) == 1 and opt.statistics["weights"].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("weighting", "error", "message"),
    [
        (lambda gram: gram, ValueError, r"weights of shape \(2,\) for a Gram .*, got \(2, 2\)"),
        (lambda gram: [0.5, 0.5], TypeError, "floating-point weights, got list"),
        (lambda gram: torch.tensor([1, 1]), TypeError, "floating-point weights, got torch.int64"),
    ],
)
def test_bad_weightings(weighting: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"weighting: it must return {message}"):
        surgery(fastdg.GramSurgery, torch.randn(2, 3), weighting=weighting)


class Weighting(nn.Module):
    def forward(self, gram: Tensor) -> Tensor:
        return gram.new_ones(len(gram))


@pytest.mark.parametrize(
    ("cls", "more", "error", "message"),
    [
        (fastdg.AgrSum, {"reduction": "none"}, ValueError, "^reduction: "),
        (
            fastdg.AgrRand,
            {"reduction": 1},
            ValueError,
            "^reduction: .*got 1",
        ),
        (
            fastdg.AgrRand,
            {"generator": 7},
            TypeError,
            "^generator: .*got int",
        ),
        (fastdg.PCGrad, {"shared_order": 1}, ValueError, "^shared_order: "),
        (fastdg.PCGrad, {"generator": "cpu"}, TypeError, "^generator: .*got str"),
        (fastdg.GramSurgery, {"weighting": None}, TypeError, "^weighting: "),
        (fastdg.GramSurgery, {"weighting": Weighting}, TypeError, "^weighting: "),
        (fastdg.AgrSum, {"num_domains": 0}, ValueError, "^num_domains: "),
    ],
)
def test_arguments(cls: Any, more: dict[str, Any], error: type[Exception], message: str) -> None:
    base = Adam(nn.Linear(2, 2).parameters())
    with pytest.raises(error, match=message):
        cls(base, **more)
    assert base.param_groups[0].keys() == Adam(nn.Linear(2, 2).parameters()).param_groups[0].keys()
