"""POGM against deep copies of the network and an optimizer for each domain, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from bases import through_a_file
from definitions import MAKES, alike, close, losses_of, net
from fishes import Round, rounds
from on_device import DEVICE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adafactor, Adagrad, Adam, Optimizer, RMSprop

import fastdg
from fastdg.algorithms.inner_loops.pogm import official_weights

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    **MAKES,
    "amsgrad": lambda m: Adam(m.parameters(), lr=1e-2, eps=1e-3, amsgrad=True),
    "rmsprop": lambda m: RMSprop(m.parameters(), lr=1e-2, eps=1e-3, momentum=0.5, centered=True),
    "adagrad": lambda m: Adagrad(m.parameters(), lr=1e-2, initial_accumulator_value=0.1),
    "sgd": lambda m: SGD(m.parameters(), lr=0.05),
    "adafactor": lambda m: Adafactor(m.parameters(), lr=1e-2),  # its tensors have other shapes
}


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def cagrad(ways: Tensor, c: float) -> Tensor:
    """The best d by brute force on the dual: exponentiated steps, from the middle."""
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    k, domains = (ways @ ways.t()).numpy(), len(ways)
    k = k / k.diagonal().max()
    mean = [1 / domains] * domains
    radius = c * float(mean @ k @ mean) ** 0.5
    found = optimize.minimize(
        lambda w: w @ k @ mean + radius * (w @ k @ w) ** 0.5,
        mean,
        jac=lambda w: k @ mean + radius * (k @ w) / (w @ k @ w) ** 0.5,
        bounds=[(0, 1)] * domains,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    w = torch.from_numpy(found.x)
    along = w @ ways
    return ways.mean(0) + c * ways.mean(0).norm() / along.norm() * along


def pogm(
    model: nn.Module,
    make: Callable[[nn.Module], Optimizer],
    data: Sequence[Round],
    each: int,
    direction: Callable[[Tensor], Tensor],
    meta_lr: float = 0.5,
    c: float = 0.5,
) -> Iterator[Tensor]:
    """The ways of every round, which has a network and an optimizer for each domain."""
    states: dict[int, Any] = {}
    for start in range(0, len(data), each):
        theta, ways = flat(model), []
        for d in range(3):
            inner = copy.deepcopy(model)
            opt = make(inner)
            if d in states:
                opt.load_state_dict(states[d])
            for k in range(each):
                x, y = data[start + k][d]
                opt.zero_grad()
                F.cross_entropy(inner(x), y).backward()
                opt.step()
            states[d] = copy.deepcopy(opt.state_dict())
            ways.append(flat(inner) - theta)
        found = torch.stack(ways)
        nn.utils.vector_to_parameters(
            theta + meta_lr * direction(found) / (1 + c**2), model.parameters()
        )
        yield found


def one(opt: Any, model: nn.Module, x: Tensor, y: Tensor, d: int) -> None:
    opt.zero_grad()
    opt.backward(losses_of(model, x, y), torch.full_like(y, d))
    opt.step()


def run(opt: Any, model: nn.Module, data: Sequence[Round], each: int) -> None:
    """Whole rounds: every domain's batches one after the other."""
    for start in range(0, len(data), each):
        for d in range(3):
            for k in range(each):
                one(opt, model, *data[start + k][d], d)


def exact(ways: Tensor) -> Tensor:
    """From the weighting, which `test_weightings` looks at; `cagrad` is SLSQP's."""
    return 1.25 * fastdg.weightings.CAGrad(0.5, rescale=1)(ways @ ways.t()) @ ways


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_definition(make: str, each: int) -> None:
    model, data = net(), rounds(4 * each)
    twin = copy.deepcopy(model)
    opt = fastdg.POGM(OPTIMIZERS[make](model), num_domains=3, domain_steps=each)
    truth = pogm(twin, OPTIMIZERS[make], data, each, exact)
    for start in range(0, len(data), each):
        run(opt, model, data[start : start + each], each)
        ways = next(truth)
        alike(model, twin, 1e-12 if make in MAKES else 1e-11)
        close(opt.statistics["gram"], ways @ ways.t())
        close(opt.statistics["trajectory"], (exact(ways) / 1.25).square().sum())
        assert opt.position == 0


def test_the_exact_solver_is_slsqp_s() -> None:
    model, data = net(), rounds(3)
    twin = copy.deepcopy(model)
    opt = fastdg.POGM(MAKES["adam"](model), num_domains=3)
    list(pogm(twin, MAKES["adam"], data, 1, lambda ways: cagrad(ways, 0.5)))
    run(opt, model, data, 1)
    alike(model, twin, 1e-7)


# -- the authors' solver --


def authors(gram: Tensor, c: float) -> Tensor:
    """As their paper's code does it: torch's SGD on logits, the best of 21 values."""
    matrix = gram / (gram.diag() + 1e-4).sqrt().mean().pow(2)
    with_mean = matrix.mean(1, keepdims=True)
    radius = (with_mean.mean(0, keepdims=True) + 1e-4).sqrt() * c
    logits = torch.zeros(len(gram), 1, dtype=gram.dtype, requires_grad=True)
    opt = SGD([logits], lr=50 if len(gram) == 50 else 25, momentum=0.5)
    best = None
    for k in range(21):
        opt.zero_grad()
        w = logits.softmax(0)
        value = w.t() @ with_mean + radius * (w.t() @ matrix @ w + 1e-4).sqrt()
        if best is None or value.item() < best[0]:
            best = value.item(), logits.detach().clone()
        if k < 20:
            value.backward()
            opt.step()
    w = best[1].softmax(0)
    length = (w.t() @ matrix @ w + 1e-4).sqrt()
    return ((1 / len(gram) + w * (radius.view(-1) / (length + 1e-4))) / (1 + c**2)).view(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("domains", [1, 2, 3, 6, 50])
def test_the_official_solver_bit_for_bit(domains: int, dtype: torch.dtype) -> None:
    for scale in (1e-3, 1.0, 30.0):
        ways = scale * torch.randn(domains, 40, dtype=dtype)
        gram = ways @ ways.t()
        assert torch.equal(official_weights(gram, 0.5), authors(gram, 0.5))


def test_what_the_authors_code_gave() -> None:
    """``cagrad`` of khanhkhanhlele/DomainBed at 84c0c54, on the rows of a table, with c = 0.4."""
    ways = torch.tensor(GIVEN)
    weights = official_weights(ways @ ways.t(), 0.4)
    torch.testing.assert_close(weights @ ways, torch.tensor(GAVE), rtol=1e-6, atol=1e-7)


GIVEN = [[1.0, 0.5, -0.25, 2.0], [-0.5, 1.0, 0.75, 0.25], [0.125, -1.5, 1.0, 0.5]]
GAVE = [0.049697745591402054, 0.1725398302078247, 0.7089190483093262, 0.8945844769477844]


@pytest.mark.parametrize("solver", ["exact", "official"])
def test_a_run_with_each_solver(solver: str) -> None:
    model, data = net(), rounds(3)
    twin = copy.deepcopy(model)
    opt = fastdg.POGM(MAKES["adam"](model), num_domains=3, solver=solver, meta_lr=0.1, c=0.1)

    def direction(ways: Tensor) -> Tensor:
        gram = ways @ ways.t()
        rule = fastdg.weightings.CAGrad(0.1)
        return rule(gram) @ ways if solver == "exact" else 1.01 * authors(gram, 0.1) @ ways

    list(pogm(twin, MAKES["adam"], data, 1, direction, 0.1, 0.1))
    run(opt, model, data, 1)
    alike(model, twin)


# -- closures, order, state --


def test_a_closure_makes_the_whole_round() -> None:
    model, data = net(), rounds(4)
    twin = copy.deepcopy(model)
    opt, loop = (
        fastdg.POGM(MAKES["adam"](m), num_domains=3, domain_steps=2, model=m) for m in (model, twin)
    )
    for start in (0, 2):
        asked: list[int] = []

        def closure(d: int, start: int = start, asked: list[int] = asked) -> Tensor:
            asked.append(d)
            return losses_of(model, *data[start + (len(asked) - 1) % 2][d])

        opt.step(closure)
        assert asked == [0, 0, 1, 1, 2, 2]
        run(loop, twin, data[start : start + 2], 2)
        alike(model, twin, 0)


def test_between_domains_the_weights_are_back() -> None:
    model, (data,) = net(), rounds(1)
    start = copy.deepcopy(model)
    opt = fastdg.POGM(MAKES["adam"](model), num_domains=3)
    for d in (0, 1):
        one(opt, model, *data[d], d)
        alike(model, start, 0)
    one(opt, model, *data[2], 2)
    assert not torch.equal(flat(model), flat(start))


def test_another_domain_than_the_next_is_refused() -> None:
    model, (data,) = net(), rounds(1)
    opt = fastdg.POGM(MAKES["adam"](model), num_domains=3)
    with pytest.raises(ValueError, match=r"^domains: POGM .*is at domain 0.*got domains \[1\]"):
        one(opt, model, *data[1], 1)
    one(opt, model, *data[0], 0)
    with pytest.raises(ValueError, match=r"^domains: POGM .*is at domain 1"):
        one(opt, model, *data[0], 0)
    one(opt, model, *data[1], 1)
    with pytest.raises(RuntimeError, match=r"2 of the 3 inner steps"):
        opt.step(lambda d: losses_of(model, *data[d]))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("way", ["file", "deepcopy"])
@pytest.mark.parametrize("steps", [4, 6, 9])
def test_goes_on_bit_for_bit(make: str, way: str, steps: int) -> None:
    """From the middle of a domain's steps, between two domains, in a second round."""
    torch.manual_seed(1)
    data = [pair for domains in rounds(6) for pair in domains]

    def made() -> tuple[nn.Module, Any]:
        torch.manual_seed(2)
        model = net(batch_norm=True)
        opt = fastdg.POGM(OPTIMIZERS[make](model), num_domains=3, domain_steps=2, model=model)
        return model, opt

    def steps_of(model: nn.Module, opt: Any, first: int, last: int) -> None:
        for k in range(first, last):
            one(opt, model, *data[k], k // 2 % 3)

    model, opt = made()
    steps_of(model, opt, 0, steps)
    if way == "file":
        again, other = through_a_file(made, model, opt)
    else:
        again, other = copy.deepcopy((model, opt))
    steps_of(model, opt, steps, 18)
    steps_of(again, other, steps, 18)
    alike(model, again, 0)


def test_a_parameter_that_one_domain_does_not_use() -> None:
    """Its state goes on for the others alone."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.extra = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return h + self.extra(x) if float(x[0, 0]) > 0 else h

    model = Split().double()
    twin = copy.deepcopy(model)
    data = []
    for _ in range(3):
        pairs = [(torch.randn(5, 4).double(), torch.arange(5) % 3) for _ in range(3)]
        for d, (x, _) in enumerate(pairs):
            x[0, 0] = x[0, 0].abs() * (-1 if d == 1 else 1)
        data.append(pairs)
    opt = fastdg.POGM(MAKES["adam"](model), num_domains=3)
    list(pogm(twin, MAKES["adam"], data, 1, exact))
    run(opt, model, data, 1)
    alike(model, twin)


def test_a_step_that_a_scaler_skips_has_no_length() -> None:
    model = nn.Linear(4, 3)
    opt = fastdg.POGM(Adam(model.parameters(), lr=1e-2), num_domains=2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    for d, factor in ((0, 1.0), (1, float("inf")), (0, 1.0), (1, 1.0)):
        opt.zero_grad()
        losses = (model(torch.randn(5, 4)) * factor).square().sum(1)
        opt.backward(losses, torch.full((5,), d), scaler=scaler)
        scaler.step(opt)
        scaler.update()
        if opt.steps == 1 and opt.position == 0:
            assert opt.statistics["gram"][1].eq(0).all() and opt.statistics["gram"][0, 0] > 0
    assert opt.steps == 3 and opt.position == 0
    assert all(p.isfinite().all() for p in model.parameters())


class Keeps(SGD):
    """Puts ``more`` into its state."""

    more: dict[str, Any]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"fine": p.detach().double(), **self.more}


@pytest.mark.parametrize("more", [torch.zeros(2, dtype=torch.bfloat16), [torch.zeros(2)]])
def test_a_state_that_it_cannot_keep_for_each_domain_is_refused(more: Any) -> None:
    model = nn.Linear(4, 3)
    base = Keeps(model.parameters(), lr=0.1)
    base.more = {"more": more}
    opt = fastdg.POGM(base, num_domains=2)
    opt.backward(model(torch.randn(5, 4)).square().sum(1), torch.zeros(5, dtype=torch.long))
    with pytest.raises(TypeError, match=r"^base: .*(bfloat16, torch.float64|a list \(more\))"):
        opt.step()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("meta_lr", -1), ("c", -1), ("domain_steps", 0), ("solver", "sgd"), ("num_domains", 0)],
)
def test_arguments(argument: str, value: Any) -> None:
    base = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"^{argument}: .*got "):
        fastdg.POGM(base, **{"num_domains": 3, argument: value})
