"""The table of the method and cost of each parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastdg

N = 6


def mlp(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), middle, nn.Tanh(), nn.Linear(4, 3))


def losses_of(model: nn.Module) -> Tensor:
    return model(torch.randn(N, 4)).square().sum(1)


def test_all_by_rules() -> None:
    model = mlp(nn.LayerNorm(4))
    table = fastdg.explain(losses_of(model), model)
    assert [row.parameter for row in table.rows] == [name for name, _ in model.named_parameters()]
    assert {row.way for row in table.rows} == {"rule"}
    assert {row.parameter: row.operations for row in table.rows} == {
        "0.weight": "Addmm",
        "0.bias": "Addmm",
        "1.weight": "NativeLayerNorm",
        "1.bias": "NativeLayerNorm",
        "3.weight": "Addmm",
        "3.bias": "Addmm",
    }
    assert not table.probed


def test_the_table_in_print() -> None:
    model = mlp(nn.BatchNorm1d(4))
    text = str(fastdg.explain(losses_of(model), model))
    lines = text.splitlines()
    assert lines[0].split() == ["parameter", "computed", "by", "operations", "cost"]
    assert set(lines[1]) == {"-"}
    assert len(lines[1]) == max(len(line) for line in lines[:8])
    assert lines[2].startswith("0.weight   autograd")
    assert "NativeBatchNorm" in lines[2]
    assert lines[6].startswith("3.weight   rule")
    assert "Addmm" in lines[6]
    columns = {line.index("autograd" if "autograd" in line else "rule") for line in lines[2:8]}
    assert len(columns) == 1
    assert repr(fastdg.explain(losses_of(model), model)) == text


def test_batch_norm_costs_a_backward_for_each_domain() -> None:
    model = mlp(nn.BatchNorm1d(4))
    table = {row.parameter: row for row in fastdg.explain(losses_of(model), model).rows}
    for name in ("0.weight", "0.bias"):
        assert table[name].way == "autograd"
        assert "one backward of all operations below per domain" in table[name].cost
    assert table["3.weight"].cost == "one product of tensors saved by the forward"
    table = {row.parameter: row for row in fastdg.explain(losses_of(model.eval()), model).rows}
    assert {row.way for row in table.values()} == {"rule"}


def test_a_weight_made_of_parameters_costs_little() -> None:
    model = mlp(parametrizations.weight_norm(nn.Linear(4, 4)))
    table = {row.parameter: row for row in fastdg.explain(losses_of(model), model).rows}
    for k in (0, 1):
        row = table[f"1.parametrizations.weight.original{k}"]
        assert row.way == "autograd"
        assert "one backward to the parameter" in row.cost
    assert table["1.bias"].way == "rule"


def test_an_operation_that_no_rule_knows() -> None:
    layer = nn.Bilinear(4, 4, 3)
    x = torch.randn(N, 4)
    (weight, bias) = fastdg.explain(layer(x, x.flip(1)).square().sum(1), layer).rows
    assert weight.cost == "one call of the operation per domain (for variances: per sample)"
    assert "Trilinear" in weight.operations
    assert bias.way == "rule"


def test_rows_that_values_choose() -> None:
    model, x = nn.Linear(4, 3), torch.randn(N, 4)
    losses = model(x)[torch.randperm(N)].square().sum(1)
    table = fastdg.explain(losses, model)
    assert table.probed
    assert "2 further backwards without weight gradients" in str(table)
    assert "further backwards" not in str(fastdg.explain(losses_of(model), model))


FORMS: dict[str, Callable[[nn.Module], object]] = {
    "model": lambda model: model,
    "list": lambda model: list(model.parameters()),
    "mapping": lambda model: dict(model.named_parameters()),
    "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "wrapper": lambda model: fastdg.Fishr(
        torch.optim.SGD(model.parameters(), lr=0.1), params="all"
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_forms(form: Callable[[nn.Module], object]) -> None:
    model = mlp(nn.PReLU(4))
    losses = losses_of(model)
    expected = [row[1:] for row in fastdg.explain(losses, model).rows]
    assert [row[1:] for row in fastdg.explain(losses, form(model)).rows] == expected  # type: ignore[arg-type]
    losses.sum().backward()  # the graph is kept


@pytest.mark.parametrize("wrapper", [fastdg.Fishr, fastdg.IGA, fastdg.AgrSum, fastdg.SANDMask])
def test_of_a_wrapper(wrapper: Callable[..., fastdg.Fishr]) -> None:
    model = mlp(nn.PReLU(4))
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
    table = wrapper(sgd).explain(losses_of(model))
    names = [row.parameter for row in table.rows]
    assert names[-2:] == ["3.weight", "3.bias"]
    assert {row.way for row in table.rows} == {"rule"}


def test_of_a_head_and_around_others() -> None:
    model = mlp(nn.PReLU(4))
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = fastdg.SWAD(fastdg.Fishr(sgd), model)
    assert [row.parameter for row in opt.explain(losses_of(model)).rows] == ["3.weight", "3.bias"]


def test_it_warns_of_nothing() -> None:
    """The table says it all, and the next statistic still warns."""
    model = mlp(nn.BatchNorm1d(4))
    losses = losses_of(model)
    opt = fastdg.Fishr(torch.optim.SGD(model.parameters(), lr=0.1), params="all")
    opt.explain(losses)
    with pytest.warns(UserWarning, match=r"^params: .*autograd for each domain"):
        opt.backward(losses, torch.tensor([0, 0, 0, 1, 1, 1]))
