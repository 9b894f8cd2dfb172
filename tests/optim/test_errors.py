"""Bad input to a wrapper: what is said, and that nothing is half-done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import WRAPS, batch, network, same, steps, trained, wrap
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

import fastdg


def model_and_wrapper(**settings: Any) -> tuple[nn.Sequential, fastdg.Fishr]:
    model = network()
    return model, wrap(Adam(model.parameters()), **{"anneal_steps": 0, **settings})


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda m: m.parameters(), r"^base: .*got generator\. .*fastdg\.Fishr\(torch\.optim\.Adam"),
        (lambda m: list(m.parameters()), "^base: .*got list"),
        (lambda m: Adam, "^base: .*got type"),
        (
            lambda m: fastdg.Fishr(Adam(m.parameters())),
            "^base: .*another Fishr",
        ),
        (
            lambda m: fastdg.AgrSum(Adam(m.parameters())),
            "^base: .*AgrSum",
        ),
        (lambda m: LBFGS(m.parameters()), "^base: .*LBFGS"),
    ],
    ids=["generator", "list", "class", "nested", "in_surgery", "lbfgs"],
)
def test_base(base: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fastdg.Fishr(base(network()))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_domains": 0}, ValueError, "^num_domains: .*got 0"),
        ({"num_domains": True}, ValueError, "^num_domains: .*got True"),
        ({"num_domains": 2.5}, ValueError, "^num_domains: .*got 2.5"),
        ({"model": "resnet"}, TypeError, "^model: .*got str"),
        ({"model": nn.Linear(2, 2)}, ValueError, "^model: "),
        ({"params": "heads"}, ValueError, "^params: .*got 'heads'"),
        ({"params": ["2.weight"]}, ValueError, "^params: .*model=.*named_parameters"),
        (
            {"params": [nn.Parameter(torch.ones(2))]},
            ValueError,
            r"params: .*tensor of shape \(2,\)",
        ),
        (
            {"params": nn.Linear(2, 2)},
            TypeError,
            r"params: .*got a module.*list\(module.parameters",
        ),
        ({"params": 7}, TypeError, "^params: .*got int"),
        ({"params": []}, ValueError, "^params: "),
    ],
)
def test_arguments(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrap(Adam(network().parameters()), **settings)


def test_a_name_that_is_not_there() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"params: .*'fc.weight'.*weight"):
        wrap(Adam(model.parameters()), model=model, params=["fc.weight"])
    with pytest.raises(ValueError, match=r"params: .*names of parameters"):
        wrap(Adam(model.named_parameters()), params=["fc.weight"])
    wrap(Adam(model.named_parameters()), params=["2.weight"])


def test_names_that_two_models_share() -> None:
    """Every parameter is trained and regularised, though the optimizer knows two by one name."""
    one, two = nn.Linear(4, 4), nn.Linear(4, 3)
    base = Adam([{"params": list(m.named_parameters())} for m in (one, two)])
    opt = wrap(base, params="all")
    steps(nn.Sequential(one, two), opt, range(2))
    assert all("fishr_ema" in opt.state[p] for m in (one, two) for p in m.parameters())


class OnceOnly(torch.autograd.Function):
    """Has a gradient, but no second one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Broken(torch.autograd.Function):
    """Has no gradient, after as many as ``left``."""

    left = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Broken.left -= 1
        if Broken.left < 0:
            raise RuntimeError("no gradient today")
        return grad * 2


class Faulty(nn.Module):
    """Can be made to break in the several ways a model breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.fault = ""

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.body(x)).tanh()
        if self.fault == "second derivative":
            h = OnceOnly.apply(h)
        if self.fault.startswith("backward"):
            Broken.left = int(self.fault[-1])
            h = Broken.apply(h)
        return self.head(h)


FAULTS = {
    "second derivative": (RuntimeError, "once_differentiable"),
    **{f"backward {n}": (RuntimeError, "no gradient today") for n in (0, 1, 2)},
    "ids": (ValueError, "^domains: .*num_domains=3.*got 3"),
    "negative": (ValueError, "^domains: .*got -1"),
    "length": (ValueError, "^domains: "),
    "scalar": (ValueError, "^losses: .*reduction='none'"),
    "twice": (RuntimeError, r"^losses: .*already called on them\. Run the model again"),
}


@pytest.mark.parametrize("gradients", [False, True], ids=["fresh", "accumulating"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["Fishr", "AgrRand", "PCGrad"])
def test_a_failed_backward_leaves_nothing_half_done(name: str, fault: str, gradients: bool) -> None:
    model = Faulty()
    more = {"params": "all", "anneal_steps": 0} if name == "Fishr" else {}
    if fault == "second derivative" and not more:
        pytest.skip("it takes none")
    opt = WRAPS[name](SGD(model.parameters(), lr=0.1), num_domains=3, **more)
    steps(model, opt, range(2))
    opt.zero_grad()
    if gradients:
        batch(model)[0].mean().backward()
    held = {p: (p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()}
    before = copy.deepcopy(opt.state_dict())
    statistics = dict(opt.statistics)

    opt.backward(*batch(model, 1), final=False)
    model.fault = fault
    losses, domains = batch(model, 2)
    if fault == "ids":
        domains[0] = 3
    elif fault == "negative":
        domains[0] = -1
    elif fault == "length":
        domains = domains[1:]
    elif fault == "scalar":
        losses = losses.mean()
    elif fault == "twice":
        opt.backward(losses, domains, final=False)
    error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        opt.backward(losses, domains)

    for p, (grad, value) in held.items():
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert str(opt.state_dict()) == str(before)
    assert opt.statistics == statistics
    model.fault = ""
    opt.zero_grad()
    opt.backward(*batch(model, 3))  # and nothing is staged
    assert int(opt.statistics["domain_count"].sum()) == 9
    opt.step()


def test_a_rejected_call_can_be_repeated() -> None:
    model, opt = model_and_wrapper(num_domains=3)
    losses, domains = batch(model)
    with pytest.raises(ValueError, match=r"^domains: .*num_domains"):
        opt.backward(losses, domains + 3)
    opt.backward(losses, domains)
    opt.step()


def test_backward_twice_on_one_forward() -> None:
    model, opt = model_and_wrapper()
    losses, domains = batch(model)
    opt.backward(losses, domains)
    with pytest.raises(RuntimeError, match=r"^losses: .*already called"):
        opt.backward(losses, domains)
    with pytest.raises(RuntimeError, match=r"^losses: .*freed"):
        opt.backward(losses * 2, domains)
    steps(model, opt, range(1))


def test_losses_of_another_model() -> None:
    model = network()
    early = batch(model)
    opt = wrap(Adam(model.parameters()))
    with pytest.raises(RuntimeError, match=r"^losses: .*tracked parameters"):
        opt.backward(*batch(network()))
    with torch.no_grad(), pytest.raises(ValueError, match=r"^losses: .*no_grad"):
        opt.backward(*batch(model))
    opt.backward(*early)  # from a forward before the wrapper was made
    opt.step()
    steps(model, opt, range(1))


def pairs(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Losses each of which depends on all samples."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 4, generator=generator).to(dtype)
    y, domains = torch.arange(9) % 3, torch.arange(9) % 2
    z = model(x)
    return F.cross_entropy(z, y, reduction="none") + (z - z.mean(0)).square().mean(1), domains


MIXING: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    "pairs": network,
}


@pytest.mark.parametrize("kind", MIXING)
def test_samples_that_meet_cost_more_and_are_right(kind: str) -> None:
    """One warning, and the domains' gradients and variances of autograd in float64."""
    torch.manual_seed(0)
    model = MIXING[kind]().double()
    opt = wrap(SGD(model.named_parameters(), lr=0.1), params="all", anneal_steps=0)
    with pytest.warns(UserWarning, match=r"^params: .*exact.* mix the samples") as told:
        losses, domains = pairs(model)
        opt.backward(losses, domains)
    assert [one.filename for one in told] == [__file__]
    assert "eval()" not in str(told[0].message)  # the pairs of the loss would still meet
    twin = copy.deepcopy(model)
    losses, domains = pairs(twin)
    parameters = list(twin.parameters())
    rows = [torch.autograd.grad(one, parameters, create_graph=True) for one in losses]
    penalty = losses.new_zeros(())
    for grads in zip(*rows, strict=True):
        each = torch.stack(grads)
        variances = [each[domains == d].var(0, correction=0) for d in (0, 1)]
        penalty = penalty + torch.stack(variances).var(0, correction=0).sum()
    penalty = penalty / sum(p.numel() for p in parameters)
    torch.testing.assert_close(opt.statistics["penalty"], penalty.detach())
    for p in parameters:
        p.grad = None
    (losses.mean() + 5.0 * penalty).backward()
    for p, q in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    opt.zero_grad()
    losses, domains = pairs(model)
    opt.backward(losses, domains)  # says nothing a second time


def test_a_state_of_another_number_of_domains() -> None:
    model, opt = trained(Adam, num_domains=3)
    state = copy.deepcopy(opt.state_dict())
    other = wrap(Adam(copy.deepcopy(model).parameters()), num_domains=4)
    with pytest.raises(ValueError, match=r"fishr_ema must have 4 domains .*num_domains.* got 3"):
        other.load_state_dict(state)
    assert other.steps == 0 and not other.state
    free = wrap(Adam(model.parameters()))  # as many as are seen: these three, and then more
    free.load_state_dict(state)
    steps(model, free, range(1))


def test_a_state_of_another_model() -> None:
    _, opt = trained(Adam)
    wide = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    other = wrap(Adam(wide.named_parameters()))
    with pytest.raises(ValueError, match=r"fishr_ema of 2\.weight .* got \(3, 5\) for each"):
        other.load_state_dict(opt.state_dict())
    small = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="parameter group"):
        wrap(Adam(small.parameters())).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("check", [False, True])
def test_check_has_no_effect(check: bool) -> None:
    found = []
    for more in ({}, {"check": check}):
        torch.manual_seed(0)
        model = network()
        opt = wrap(SGD(model.parameters(), lr=0.1), params="all", **more)
        steps(model, opt, range(3))
        found.append(model)
    same(*found)


def test_packed_attention_is_refused_before_the_anneal() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q = self.inner(x).unsqueeze(1)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                attended = F.scaled_dot_product_attention(q, q, q)
            return self.head(attended.mean((1, 2)))

    model, x = Attention(), torch.randn(6, 5, 4)
    opt = wrap(SGD(model.parameters(), lr=0.1), params="all", anneal_steps=100)
    losses = F.cross_entropy(model(x), torch.arange(6) % 3, reduction="none")
    with pytest.raises(RuntimeError, match=r"^create_graph: .*SDPBackend\.MATH"):
        opt.backward(losses, torch.arange(6) % 2)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("ids", [[2016, 2017, 2016, 2018], [20161231, 0, 1, 2]])
def test_years_are_no_domain_ids(ids: list[int]) -> None:
    model, opt = model_and_wrapper(num_domains=None)
    losses = batch(model, 0)[0][:4]
    with pytest.raises(ValueError, match=r"^domains: .*got 20.*torch\.unique"):
        opt.backward(losses, torch.tensor(ids))
