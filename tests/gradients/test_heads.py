"""``params="head"``: the parameters of the last layer, however it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import assert_close, one_by_one, trainable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fastdg

N = 6
X, Y = torch.randn(N, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0, 2])


class Model(nn.Module):
    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **more: object) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, 5), nn.Linear(5, 3)
        for name, value in more.items():
            setattr(self, name, value)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def hidden(m: nn.Module, x: Tensor) -> Tensor:
    return m.body(x).relu()


def number(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


HEADS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "a module": (lambda: Model(lambda m, x: m.fc(hidden(m, x))), {"fc.weight", "fc.bias"}),
    "a function": (
        lambda: Model(lambda m, x: F.linear(hidden(m, x), m.fc.weight)),
        {"fc.weight"},
    ),
    "a function with bias": (
        lambda: Model(lambda m, x: F.linear(hidden(m, x), m.fc.weight, m.fc.bias)),
        {"fc.weight", "fc.bias"},
    ),
    "product and sum": (
        lambda: Model(lambda m, x: hidden(m, x) @ m.fc.weight.t() + m.fc.bias),
        {"fc.weight", "fc.bias"},
    ),
    "product and sum of bare parameters": (
        lambda: Model(
            lambda m, x: hidden(m, x) @ m.w + m.b,
            w=nn.Parameter(torch.randn(5, 3).double()),
            b=nn.Parameter(torch.zeros(3).double()),
        ),
        {"w", "b"},
    ),
    "cosine": (
        lambda: Model(
            lambda m, x: F.linear(F.normalize(hidden(m, x)), F.normalize(m.fc.weight)) * 9
        ),
        {"fc.weight"},
    ),
    "cosine with a scale beside": (
        lambda: Model(
            lambda m, x: F.linear(F.normalize(hidden(m, x)), F.normalize(m.fc.weight)) * m.s,
            s=number(9.0),
        ),
        {"fc.weight"},
    ),
    "weight norm": (
        lambda: Model(
            lambda m, x: m.fc(hidden(m, x)), fc=parametrizations.weight_norm(nn.Linear(5, 3))
        ),
        {"fc.bias", "fc.parametrizations.weight.original0", "fc.parametrizations.weight.original1"},
    ),
    "spectral norm": (
        lambda: Model(
            lambda m, x: m.fc(hidden(m, x)), fc=parametrizations.spectral_norm(nn.Linear(5, 3))
        ),
        {"fc.bias", "fc.parametrizations.weight.original"},
    ),
    "two, of which the last": (
        lambda: Model(lambda m, x: m.fc(hidden(m, x)) + m.other(x), other=nn.Linear(4, 3)),
        {"other.weight", "other.bias"},
    ),
    "run twice": (
        lambda: Model(lambda m, x: m.fc(hidden(m, x)) - m.fc(m.body(x).tanh())),
        {"fc.weight", "fc.bias"},
    ),
    "tokens": (
        lambda: Model(lambda m, x: m.fc(hidden(m, x[:, None].expand(-1, 3, -1))).mean(1)),
        {"fc.weight", "fc.bias"},
    ),
    "tokens, sequence first": (
        lambda: Model(lambda m, x: m.fc(hidden(m, x.expand(3, -1, -1))).mean(0)),
        {"fc.weight", "fc.bias"},
    ),
    "a convolution": (
        lambda: Model(lambda m, x: m.c(hidden(m, x)[:, :, None])[:, :, 0], c=nn.Conv1d(5, 3, 1)),
        {"c.weight", "c.bias"},
    ),
    "a norm": (
        lambda: Model(lambda m, x: m.norm(m.fc(hidden(m, x))), norm=nn.LayerNorm(3)),
        {"norm.weight", "norm.bias"},
    ),
    "above batch norm in training": (
        lambda: Model(lambda m, x: m.fc(m.norm(hidden(m, x))), norm=nn.BatchNorm1d(5)),
        {"fc.weight", "fc.bias"},
    ),
    "with an unused layer after it": (
        lambda: Model(lambda m, x: m.fc(hidden(m, x)), later=nn.Linear(3, 3)),
        {"fc.weight", "fc.bias"},
    ),
}


@pytest.mark.parametrize(("make", "expected"), HEADS.values(), ids=HEADS.keys())
def test_head(make: Callable[[], nn.Module], expected: set[str]) -> None:
    model = make().double()
    with fastdg.record(model, "head") as tape:
        losses = F.cross_entropy(model(X), Y, reduction="none")
    for _ in range(2):  # found, and remembered
        got = fastdg.per_sample_gradients(tape, losses)
        assert set(got) == expected
    chosen = {name: trainable(model)[name] for name in got}
    for name, g in one_by_one(losses, chosen).items():
        assert_close(got[name], g, name)


def test_a_head_of_zeros() -> None:
    model = Model(lambda m, x: m.fc(hidden(m, x))).double()
    nn.init.zeros_(model.fc.weight)
    with fastdg.record(model, "head") as tape:
        losses = F.cross_entropy(model(X), Y, reduction="none")
    assert set(fastdg.per_sample_gradients(tape, losses)) == {"fc.weight", "fc.bias"}


def test_a_frozen_head_is_none() -> None:
    """The last layer that is trained."""
    model = Model(lambda m, x: m.fc(hidden(m, x))).double()
    model.fc.requires_grad_(False)
    with fastdg.record(model, "head") as tape:
        losses = F.cross_entropy(model(X), Y, reduction="none")
    assert set(fastdg.per_sample_gradients(tape, losses)) == {"body.weight", "body.bias"}


def test_a_tied_head_counts_every_use() -> None:
    model = Model(
        lambda m, x: F.linear(m.table(Y).tanh() + m.body(x), m.table.weight),
        table=nn.Embedding(3, 5),
    ).double()
    with fastdg.record(model, "head") as tape:
        losses = F.cross_entropy(model(X), Y, reduction="none")
    got = fastdg.per_sample_gradients(tape, losses)
    assert set(got) == {"table.weight"}
    true = one_by_one(losses, {"table.weight": model.table.weight})
    assert_close(got["table.weight"], true["table.weight"], "table")


CRITERIA: dict[str, Callable[[nn.Module], Tensor]] = {
    "weights of losses": lambda m: (
        F.cross_entropy(m(X), Y, reduction="none") * (-m.crit["w"][0]).exp() + m.crit["w"][0]
    ),
    "weights of two losses": lambda m: (
        F.cross_entropy(m(X), Y, reduction="none") * m.crit["w"][0]
        + m(X).square().sum(1) * m.crit["w"][1]
    ),
    "temperature": lambda m: F.cross_entropy(m(X) / m.crit["t"], Y, reduction="none"),
}


@pytest.mark.parametrize("losses_of", CRITERIA.values(), ids=CRITERIA.keys())
def test_parameters_of_a_criterion_are_no_head(losses_of: Callable[[nn.Module], Tensor]) -> None:
    criterion = nn.ParameterDict(
        {"w": nn.Parameter(torch.ones(2)), "t": nn.Parameter(torch.ones(()))}
    )
    model = Model(lambda m, x: m.fc(hidden(m, x)), crit=criterion).double()
    with fastdg.record(model, "head") as tape:
        losses = losses_of(model)
    assert set(fastdg.per_sample_gradients(tape, losses)) == {"fc.weight", "fc.bias"}


def test_heads_of_an_optimizer_that_knows_no_names() -> None:
    model = Model(lambda m, x: m.fc(hidden(m, x))).double()
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1))
    losses = F.cross_entropy(model(X), Y, reduction="none")
    assert [row.parameter for row in opt.explain(losses).rows] == [
        "param_groups[0][2]",
        "param_groups[0][3]",
    ]


@pytest.mark.parametrize("first", [[0.0] * N, [0.0] * (N - 1) + [1.0]])
def test_a_first_step_without_gradients_hides_no_part_of_the_head(first: list[float]) -> None:
    """Samples do not seem to be mixed below a weight norm whose gradient is zero, or of one."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), parametrizations.weight_norm(nn.Linear(5, 3)))
    for scale in (torch.tensor(first), torch.ones(N)):
        with fastdg.record(model, "head") as tape:
            losses = F.cross_entropy(model(X), Y, reduction="none") * scale
        head = fastdg.per_sample_gradients(tape, losses)
    assert set(head) == {name for name in dict(model.named_parameters()) if name.startswith("2.")}
