"""Objectives of features, losses and logits against DomainBed's formulas written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import fastdg


class Forward(NamedTuple):
    """One forward: what an objective is made of."""

    features: Tensor
    logits: Tensor
    losses: Tensor
    domains: Tensor

    @property
    def parts(self) -> list[Tensor]:
        """Which samples each domain has, of those with samples."""
        return [(self.domains == d).nonzero().squeeze(1) for d in self.domains.unique()]

    @property
    def risks(self) -> Tensor:
        return torch.stack([self.losses[part].mean() for part in self.parts])


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged domains; from step 3 on one of four is absent."""
    generator = torch.Generator().manual_seed(step)
    n = 14 + step
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    domains = torch.arange(n) % 4 if step < 3 else torch.arange(n) % 3 + 1
    return (
        x,
        torch.randint(3, (n,), generator=generator),
        domains[torch.randperm(n, generator=generator)],
    )


def forward(model: nn.Sequential, x: Tensor, y: Tensor, domains: Tensor) -> Forward:
    features = model[0](x)
    logits = model[1](features)
    return Forward(features, logits, F.cross_entropy(logits, y, reduction="none"), domains)


def squares(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(1) - y).square().sum(2)


def kernel(x: Tensor, y: Tensor, low: int) -> Tensor:
    distances = squares(x, y)
    return torch.stack([(-(10.0**m) * distances).exp() for m in range(low, 4)]).sum(0).mean()


def mmd_of(x: Tensor, y: Tensor, low: int = -3) -> Tensor:
    return kernel(x, x, low) + kernel(y, y, low) - 2 * kernel(x, y, low)


def coral_of(x: Tensor, y: Tensor) -> Tensor:
    means = (x.mean(0) - y.mean(0)).square().mean()
    return means + (x.t().cov() - y.t().cov()).square().mean()


def pairs(f: Forward, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    z = [f.features[part] for part in f.parts]
    found = [distance(z[i], z[j]) for j in range(len(z)) for i in range(j)]
    return f.risks.mean() + 2.0 * torch.stack(found).mean()


def bottleneck(f: Forward) -> Tensor:
    return torch.stack([f.features[part].var(0).mean() for part in f.parts]).mean()


def irm_of(f: Forward) -> Tensor:
    """DomainBed's penalty: the product of the two halves' derivatives by a scale."""
    found = []
    for part in f.parts:
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        logits = f.logits[part] * scale
        y = labels_of(f)[part]
        halves = [F.cross_entropy(logits[k::2], y[k::2]) for k in (0, 1)]
        a, b = (torch.autograd.grad(half, scale, create_graph=True)[0] for half in halves)
        found.append(a * b)
    return torch.stack(found).mean()


LABELS: dict[int, Tensor] = {}


def labels_of(f: Forward) -> Tensor:
    return LABELS[len(f.losses)]


def rdm_of(f: Forward) -> Tensor:
    worst = f.losses[f.parts[int(f.risks.argmax())]]
    penalty = mmd_of(worst.unsqueeze(1), f.losses.unsqueeze(1), -4)
    return f.risks.mean() + 0.7 * penalty + 0.3 * (worst.var() + f.losses.var())


def sd_of(f: Forward) -> Tensor:
    return f.losses.mean() + 0.2 * f.logits.square().mean()


CASES: dict[str, tuple[Callable[[Optimizer], Any], Callable[[Forward], Tensor]]] = {
    "CORAL": (lambda base: fastdg.CORAL(base, penalty_weight=2.0), lambda f: pairs(f, coral_of)),
    "MMD": (lambda base: fastdg.MMD(base, penalty_weight=2.0), lambda f: pairs(f, mmd_of)),
    "IBERM": (
        lambda base: fastdg.IBERM(base, penalty_weight=2.0, anneal_steps=0),
        lambda f: f.risks.mean() + 2.0 * bottleneck(f),
    ),
    "IBIRM": (
        lambda base: fastdg.IBIRM(
            base,
            penalty_weight=3.0,
            bottleneck_weight=2.0,
            anneal_steps=0,
            bottleneck_anneal_steps=0,
        ),
        lambda f: f.risks.mean() + 3.0 * irm_of(f) + 2.0 * bottleneck(f),
    ),
    "RDM": (
        lambda base: fastdg.RDM(base, penalty_weight=0.7, variance_weight=0.3, anneal_steps=0),
        rdm_of,
    ),
    "SD": (lambda base: fastdg.SD(base, penalty_weight=0.2), sd_of),
}


def inputs(opt: Any, f: Forward) -> dict[str, Tensor]:
    features = {"features": f.features} if "features" in getattr(opt, "takes", ()) else {}
    return {**features, **({"logits": f.logits} if isinstance(opt, fastdg.SD) else {})}


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_formula(name: str, micro: bool) -> None:
    wrap, objective = CASES[name]
    model, other = network(), network()
    opt, plain = wrap(Adam(model.parameters(), 1e-2)), Adam(other.parameters(), 1e-2)
    for step in range(5):
        x, y, domains = batch(step)
        LABELS[len(y)] = y
        plain.zero_grad()
        value = objective(forward(other, x, y, domains))
        value.backward()
        plain.step()
        opt.zero_grad()
        cuts = [part.tensor_split(3) if micro else [part] for part in (x, y, domains)]
        calls = list(zip(*cuts, strict=True))
        for k, call in enumerate(calls):
            f = forward(model, *call)
            opt.backward(f.losses, f.domains, final=k == len(calls) - 1, **inputs(opt, f))
        opt.step()
        torch.testing.assert_close(opt.statistics["objective"], value.detach(), rtol=1e-12, atol=0)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["CORAL", "MMD", "IBERM", "RDM"])
def test_one_domain_or_one_sample_of_it_is_finite(name: str) -> None:
    model = network()
    opt = CASES[name][0](Adam(model.parameters(), 1e-2))
    for domains in (torch.zeros(5, dtype=torch.int64), torch.tensor([0, 0, 0, 0, 1])):
        f = forward(model, torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3, domains)
        opt.zero_grad()
        opt.backward(f.losses, domains, **inputs(opt, f))
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert opt.statistics["objective"].isfinite()


def test_rows_without_dimensions() -> None:
    """One number for each sample, as the logits of two classes."""
    z = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for name in ("CORAL", "MMD", "IBERM", "SD"):
        opt = CASES[name][0](torch.optim.SGD([z], lr=0.1))
        given = {"logits": z * 1.0} if name == "SD" else {"features": z * 1.0}
        opt.zero_grad()
        opt.backward(z.square(), torch.arange(8) % 2, **given)
        assert z.grad.isfinite().all()


def test_wrong_inputs_are_told() -> None:
    model = network()
    f = forward(model, *batch(0))
    before = [p.grad for p in model.parameters()]
    opt = fastdg.CORAL(Adam(model.parameters()))
    with pytest.raises(TypeError, match=r"^features: expected a tensor .*got NoneType"):
        opt.backward(f.losses, f.domains)
    f = forward(model, *batch(0))
    with pytest.raises(ValueError, match=r"^features: expected one row for each of 14 losses"):
        opt.backward(f.losses, f.domains, features=f.features[:3])
    f = forward(model, *batch(0))
    with pytest.raises(ValueError, match=r"^features: expected a tensor with its graph"):
        opt.backward(f.losses, f.domains, features=f.features.detach())
    f = forward(model, *batch(0))
    opt.backward(f.losses, f.domains, False, features=f.features)
    f = forward(model, *batch(0))
    with pytest.raises(ValueError, match=r"^features: expected as many features in all micro"):
        opt.backward(f.losses, f.domains, features=f.features[:, 1:])
    with pytest.raises(ValueError, match=r"^logits: expected a tensor with its graph"):
        sd = fastdg.SD(Adam(model.parameters()))
        sd.backward(forward(model, *batch(0)).losses, f.domains, logits=f.logits.detach())
    f = forward(model, *batch(0))
    with pytest.raises(TypeError, match=r"^feature: .*Did you mean features="):
        opt.backward(f.losses, f.domains, feature=f.features)
    assert [p.grad for p in model.parameters()] == before
    with pytest.raises(TypeError, match=r"^logits: SD needs logits"):
        fastdg.SD(Adam(model.parameters())).backward(forward(model, *batch(0)).losses, f.domains)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sd_squares_halves_in_float32(dtype: torch.dtype) -> None:
    logits = torch.tensor([[300.0, -2.0], [1.5, 0.25]]).to(dtype).requires_grad_()  # 300^2 > 65504
    losses = F.cross_entropy(logits.float(), torch.tensor([0, 1]), reduction="none")
    opt = fastdg.SD(SGD([logits], 1.0), penalty_weight=0.2)
    opt.backward(losses, torch.tensor([0, 1]), logits=logits)
    expected = logits.detach().float().square().mean()
    torch.testing.assert_close(opt.statistics["sd"], expected)


@pytest.mark.parametrize("kind", [fastdg.CORAL, fastdg.MMD])
def test_a_weight_of_0_needs_no_graph_of_the_penalty(kind: Any) -> None:
    model, plain = network(), network()
    opt = kind(Adam(model.parameters()), penalty_weight=0.0)
    f = forward(model, *batch(0))
    opt.backward(f.losses, f.domains, features=f.features)
    assert opt.statistics["penalty"] > 0
    g = forward(plain, *batch(0))
    means = [g.losses[g.domains == d].mean() for d in g.domains.unique()]
    torch.stack(means).mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


def test_a_term_inside_and_an_algorithm_around() -> None:
    model, other = network(), network()
    inside = fastdg.SD(Adam(model.parameters(), 1e-2), penalty_weight=0.2)
    opt = fastdg.CORAL(inside, penalty_weight=2.0)
    f = forward(model, *batch(0))
    opt.backward(f.losses, f.domains, features=f.features, logits=f.logits)
    g = forward(other, *batch(0))
    (pairs(g, coral_of) + 0.2 * g.logits.square().mean()).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


# -- EQRM --


def quantile(losses: Tensor, alpha: float) -> float:
    """By bisection on the definition, on numbers."""
    values = losses.tolist()
    d = len(values)
    h = 1.06 * float(losses.std()) * d**-0.2
    low, high = min(values) - 9 * h, max(values) + 9 * h
    for _ in range(200):
        q = (low + high) / 2
        above = sum(NormalDist().cdf((q - v) / h) for v in values) / d >= alpha
        low, high = (low, q) if above else (q, high)
    return q


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("domains", [2, 3, 5, 17])
def test_eqrm_descends_the_quantile(domains: int, alpha: float) -> None:
    """Its weights are finite differences of the quantile, and sum to 1."""
    risks = torch.rand(domains, dtype=torch.float64) * 2
    weights = nn.Parameter(torch.zeros(domains, dtype=torch.float64))
    opt = fastdg.EQRM(torch.optim.SGD([weights], lr=1.0), quantile=alpha, anneal_steps=0)
    opt.backward(risks + weights, torch.arange(domains))
    expected = quantile(risks, alpha)
    torch.testing.assert_close(float(opt.statistics["objective"]), expected, rtol=1e-10, atol=1e-10)
    step, slopes = 1e-5, []
    for d in range(domains):
        up, down = risks.clone(), risks.clone()
        up[d] += step
        down[d] -= step
        slopes.append((quantile(up, alpha) - quantile(down, alpha)) / (2 * step))
    torch.testing.assert_close(
        weights.grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(float(weights.grad.sum()), 1.0)
    assert torch.equal(opt.statistics["weights"], weights.grad)


def test_eqrm_has_domainbeds_gradient_by_a_switch() -> None:
    """Autograd through a bisection between the interval's ends, as DomainBed differentiates."""
    risks = torch.rand(5, dtype=torch.float64).requires_grad_()
    alpha = 0.75
    h = 1.06 * risks.std() * 5**-0.2
    z = torch.special.ndtri(torch.tensor(alpha, dtype=torch.float64))
    low, high = risks.min() + h * z, risks.max() + h * z
    for _ in range(60):
        middle = (low + high) / 2
        above = torch.special.ndtr((middle - risks) / h).mean() >= alpha
        low, high = (low, middle) if above else (middle, high)
    (slopes,) = torch.autograd.grad((low + high) / 2, risks)
    weights = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    settings = {"quantile": alpha, "anneal_steps": 0, "gradient": "domainbed"}
    opt = fastdg.EQRM(torch.optim.SGD([weights], lr=1.0), **settings)
    opt.backward(risks.detach() + weights, torch.arange(5))
    torch.testing.assert_close(weights.grad, slopes, rtol=1e-9, atol=1e-9)


def test_eqrm_and_domains_that_are_absent_or_equal() -> None:
    weights = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def grad(losses: list[float], domains: list[int]) -> Tensor:
        opt = fastdg.EQRM(torch.optim.SGD([weights], lr=1.0), num_domains=9, anneal_steps=0)
        opt.zero_grad()
        opt.backward(torch.tensor(losses, dtype=torch.float64) + weights, torch.tensor(domains))
        return weights.grad.clone()

    risks = [0.3, 0.9, 0.1, 0.7, 0.2, 0.5]
    some = grad(risks, [1, 3, 4, 6, 7, 8])
    torch.testing.assert_close(some, grad(risks, [0, 1, 2, 3, 4, 5]))
    mean = torch.full((6,), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(grad([0.4] * 6, [0, 1, 2, 3, 4, 5]), mean)
    torch.testing.assert_close(grad(risks, [2] * 6), mean)


@pytest.mark.parametrize("kind", [fastdg.EQRM, fastdg.RDM])
def test_the_burn_in_ends_with_a_new_optimizer_and_its_rate(kind: Any) -> None:
    model = network()
    opt = kind(Adam(model.parameters(), 1e-2), anneal_steps=2, lr_after_anneal=1e-4)
    for step in range(4):
        f = forward(model, *batch(0))
        if step < 2:
            plain = copy.deepcopy(model)
            forward(plain, *batch(0)).risks.mean().backward()
        opt.zero_grad()
        opt.backward(f.losses, f.domains)
        if step < 2:
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-14)
        opt.step()
        first = next(iter(model.parameters()))
        assert float(opt.base.state[first]["step"]) == (step + 1 if step < 2 else step - 1)
        assert opt.param_groups[0]["lr"] == (1e-2 if step < 2 else 1e-4)
    with pytest.raises(ValueError, match=r"^quantile: "):
        fastdg.EQRM(Adam(model.parameters()), quantile=1.0)
