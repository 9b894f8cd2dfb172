"""Gradients through the shared part of a graph are counted once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from functions import Scale
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg.domains import partition
from fastdg.factors import PerSampleGrad
from fastdg.gradients.by_autograd import ByAutograd
from fastdg.statistics.record import tape_of

N, C = 4, 3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compare(losses: Tensor, parameters: dict[str, Tensor]) -> None:
    rows = [
        torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        for loss in losses
    ]
    got = fastdg.per_sample_gradients(losses, params=parameters)
    for k, (name, p) in enumerate(parameters.items()):
        expected = torch.stack([row[k] for row in rows])
        found = got.get(name, torch.zeros(len(losses), *p.shape))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=name)


class Derived(nn.Module):
    """A weight that is made from parameters, a table that all samples read, and their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C))
        self.table = nn.Parameter(torch.randn(2, C))
        self.a, self.b = nn.Parameter(torch.randn(2, C)), nn.Parameter(torch.randn(C, 2))


# Operations between the samples' own rows, where a boundary is, and the table with all rows
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda h: h,
    "one operation": lambda h: h.tanh(),
    "many operations": lambda h: h.tanh().exp().sin(),
}
WEIGHTS: dict[str, Callable[[Derived], Tensor]] = {
    "masked": lambda m: m.weight * torch.ones(C, C).tril(),
    "normed": lambda m: m.weight / m.weight.norm(dim=1, keepdim=True),
    "low rank": lambda m: m.b @ (m.a / m.a.norm(dim=1, keepdim=True)),
    "made from the table": lambda m: m.weight @ m.table.t() @ m.table,
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("between", BETWEEN)
def test_a_boundary_far_below_another(weight: str, between: str) -> None:
    """The rows of samples lie in one table with rows that all of them read."""
    model = Derived()
    h = BETWEEN[between](F.linear(torch.randn(N, C), WEIGHTS[weight](model)))
    rows = torch.cat([model.table, h])
    own = torch.stack([torch.arange(N) + 2, torch.arange(N) % 2], 1)
    losses = rows[own].sin().square().sum((1, 2))
    compare(losses, dict(model.named_parameters()))


def test_what_was_computed_for_a_partition_is_not_returned_for_a_later_one() -> None:
    """A partition, or weights, that nobody keeps may have the address of one before."""
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, 2))
    losses = model(torch.randn(N, C)).square().sum(1)
    names, domains = dict(model.named_parameters()), torch.arange(N)
    rows = fastdg.per_sample_gradients(losses, params=names)
    seen = 0

    def use(name: str, factor: PerSampleGrad) -> None:
        nonlocal seen
        if not isinstance(factor, ByAutograd):
            return
        seen += 1
        for step in range(40):
            shuffled = (domains * (step % 3) + step) % N
            expected = torch.stack([rows[name][shuffled == d].sum(0) for d in range(N)])
            count = (
                torch.bincount(shuffled, minlength=N)
                .clamp(min=1)
                .view(-1, *[1] * (rows[name].dim() - 1))
            )
            made = partition(shuffled, losses, N)
            torch.testing.assert_close(factor.domain(made), expected / count)
            del made
            scaled = factor.scaled(torch.full((N,), float(step)))
            torch.testing.assert_close(scaled.per_sample(), step * rows[name])
            del scaled

    tape_of(names).resolve(losses).collect(use, retain_graph=True)
    assert seen


def test_a_function_whose_other_input_comes_from_the_same_parameter() -> None:
    model = Derived()
    gain = model.weight[0]
    compare(Scale.apply((torch.randn(N, C) + gain).tanh(), gain).sin().sum(1), {"w": model.weight})
    vector = nn.Parameter(torch.randn(C))
    h = (torch.randn(N, C) + vector).tanh()
    compare(Scale.apply(h, vector).sin().sum(1), {"vector": vector})


# Complex operations that real parameters reach, on h [N, 2, C]
COMPLEX: dict[str, Callable[[Derived, Tensor], Tensor]] = {
    "a real factor": lambda m, h: h * m.table,
    "a real divisor": lambda m, h: h / m.table,
    "a real bias": lambda m, h: torch.addcmul(m.table, m.table, h) - m.table,
    "a phase": lambda m, h: h * torch.exp(1j * m.table),
    "a filter": lambda m, h: h * torch.view_as_complex(torch.stack([m.table, m.a], -1)),
    "a cast weight": lambda m, h: h @ m.weight.to(h.dtype),
    "a conjugate weight": lambda m, h: h @ torch.complex(m.weight, m.weight.exp()).mH,
    "a kernel's spectrum": lambda m, h: h * torch.fft.fft(m.table),
}


@pytest.mark.parametrize("operation", COMPLEX)
def test_real_parameters_of_complex_operations(operation: str) -> None:
    model = Derived()
    f = COMPLEX[operation](model, torch.fft.fft(torch.randn(N, 2, C)))
    compare(f.conj().exp().imag.sum((1, 2)) + f.abs().sum((1, 2)), dict(model.named_parameters()))


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("rows", [3, 4, 6])
def test_group_norm_below_a_boundary_differentiated_twice(
    samples: int, groups: int, rows: int
) -> None:
    """Its batched backward is wrong, without an error, where the sizes happen to fit."""
    weight = nn.Parameter(torch.randn(6, 6))
    domains = torch.arange(samples) % 3

    def losses() -> Tensor:
        h = F.group_norm((torch.randn(samples, 6) @ weight).unsqueeze(2).expand(-1, -1, 2), groups)
        return (h - h.mean(0) / 2).sin().sum((1, 2)) + h.square().mean()

    value = losses()
    moments = fastdg.domain_moments(
        value, domains, params={"w": weight}, num_domains=rows, create_graph=True
    )
    each = [
        torch.autograd.grad(v, [weight], retain_graph=True, create_graph=True)[0] for v in value
    ]
    for d in range(samples):
        torch.testing.assert_close(moments.mean["w"][d], each[d])
    factor = torch.randn(samples, 6, 6)
    (got,) = torch.autograd.grad(
        (moments.mean["w"][:samples] * factor).sum(), [weight], retain_graph=True
    )
    (expected,) = torch.autograd.grad((torch.stack(each) * factor).sum(), [weight])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("create_graph", [False, True], ids=["", "differentiable"])
@pytest.mark.parametrize("kind", ["weight norm", "no rule", "batch norm"])
def test_hooks_of_parameters_do_not_change_gradients_by_autograd(
    kind: str, create_graph: bool
) -> None:
    """A hook sees the gradient that a step makes, and nothing that a statistic is made of."""
    layer = {
        "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(C, C)),
        "no rule": lambda: nn.Bilinear(C, C, C),
        "batch norm": lambda: nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)),
    }[kind]().double()
    named = dict(layer.named_parameters())
    x = torch.randn(N, C, dtype=torch.float64)
    out = layer(x, x) if kind == "no rule" else layer(x)
    losses = (out - x).square().sum(1)
    domains = torch.tensor([0, 1, 1, 0])
    expected = fastdg.domain_moments(losses, domains, params=named)
    called: list[Tensor] = []

    def halved(grad: Tensor) -> Tensor:
        called.append(grad)
        return grad / 2

    for p in layer.parameters():
        p.register_hook(halved)
    got = fastdg.domain_moments(losses, domains, params=named, create_graph=create_graph)
    for name in named:
        torch.testing.assert_close(got.mean[name], expected.mean[name])
        torch.testing.assert_close(got.variance[name], expected.variance[name])
    assert not called


def test_untracked_parameters_in_the_shared_part() -> None:
    """Their gradients come from the same backward, which may not free it."""
    a, b = (nn.Parameter(torch.randn(3, 3)) for _ in range(2))
    opt = fastdg.Fishr(torch.optim.SGD([a, b], lr=0.1), params=[a], ema=None)
    x, domains = torch.randn(6, 3), torch.arange(6) % 2
    losses = (x @ (a * b.exp())).square().sum(1)
    expected = torch.autograd.grad(losses.mean(), [a, b], retain_graph=True)
    opt.backward(losses, domains)
    for p, grad in zip((a, b), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
    with pytest.raises(RuntimeError, match=r"^losses: .*freed"):
        losses.sum().backward()
