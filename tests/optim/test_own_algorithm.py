"""What it takes to write an algorithm of one's own, as CONTRIBUTING says."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bases import Network
from torch import Tensor, nn

import fastdg
from fastdg.core.closures import Forward
from fastdg.core.combine.combiner import Combined, DomainGradients, GradientCombiner
from fastdg.core.hyper import check_weight, hyper
from fastdg.core.step_batch import StepBatch, StepRecord


class CosinePenalty(fastdg.DomainOptimizer):
    penalty_weight: float = hyper(1.0, check_weight)

    def objective(self, batch: StepBatch) -> Tensor:
        means = batch.means(differentiable=True).values()
        unit = F.normalize(torch.cat([mean.reshape(len(mean), -1) for mean in means], 1), dim=1)
        penalty = 1 - batch.shares @ (unit @ unit.t()) @ batch.shares
        return batch.penalised(batch.loss, self.penalty_weight, penalty)


class Softest(GradientCombiner):
    def combine(self, gradients: DomainGradients) -> Combined:
        return gradients.weighted_sum((-gradients.gram().diagonal()).softmax(0))


def data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (12,), generator=generator), torch.arange(12) % 3


def model_and_losses(seed: int = 0) -> tuple[Network, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Network().double()
    x, y, domains = data(seed)
    return model, F.cross_entropy(model(x), y, reduction="none"), domains


def by_domain(model: Network, losses: Tensor, domains: Tensor, create_graph: bool) -> Tensor:
    """The domains' gradients, flat, ``[D, P]``."""
    rows = []
    for d in range(3):
        loss = losses[domains == d].mean()
        grads = torch.autograd.grad(
            loss, list(model.parameters()), create_graph=create_graph, retain_graph=True
        )
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def gradient(model: Network) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("num_domains", [None, 5], ids=["all", "two_without_samples"])
def test_an_objective_in_seven_lines(num_domains: int | None) -> None:
    model, losses, domains = model_and_losses()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = CosinePenalty(base, penalty_weight=0.5, num_domains=num_domains)
    rows = F.normalize(by_domain(model, losses, domains, create_graph=True), dim=1)
    penalty = 1 - (rows @ rows.t()).mean()
    objective = losses.mean() + 0.5 * penalty
    wanted = torch.autograd.grad(objective, list(model.parameters()), retain_graph=True)
    opt.backward(losses, domains)
    torch.testing.assert_close(gradient(model), torch.cat([g.flatten() for g in wanted]))
    torch.testing.assert_close(opt.statistics["penalty"], penalty.detach())
    torch.testing.assert_close(opt.statistics["objective"], objective.detach())
    opt.step()
    assert opt.steps == 1
    assert opt.state_dict()["param_groups"][0]["cosinepenalty_penalty_weight"] == 0.5
    assert "penalty_weight=0.5" in repr(opt)


def test_a_combination_in_three_lines() -> None:
    model, losses, domains = model_and_losses()
    opt = Softest(torch.optim.SGD(model.parameters(), lr=0.1))
    rows = by_domain(model, losses, domains, create_graph=False)
    wanted = (-rows.square().sum(1)).softmax(0) @ rows
    opt.backward(losses, domains)
    torch.testing.assert_close(gradient(model), wanted)


def test_an_objective_may_use_what_it_likes() -> None:
    """A part that no batch knows of, beside the losses of samples and of domains."""

    class Decayed(fastdg.DomainOptimizer):
        looks_at_samples = False

        def objective(self, batch: StepBatch) -> Tensor:
            decay = sum(p.square().sum() for group in self.param_groups for p in group["params"])
            return 0.5 * batch.loss + batch.domain_losses.max() + 0.1 * decay

    model, losses, domains = model_and_losses()
    opt = Decayed(torch.optim.SGD(model.parameters(), lr=0.1))
    parameters = list(model.parameters())
    worst = torch.stack([losses[domains == d].mean() for d in range(3)]).max()
    decay = sum(p.square().sum() for p in parameters)
    objective = 0.5 * losses.mean() + worst + 0.1 * decay
    wanted = torch.autograd.grad(objective, parameters, retain_graph=True)
    opt.backward(losses, domains)
    torch.testing.assert_close(gradient(model), torch.cat([g.flatten() for g in wanted]))


def test_an_objective_may_weigh_the_domains_under_no_grad() -> None:
    class Weighted(fastdg.DomainOptimizer):
        looks_at_samples = False

        def objective(self, batch: StepBatch) -> Tensor:
            with torch.no_grad():
                weights = batch.shares * batch.domain_losses
            return batch.loss + (weights * batch.domain_losses).sum()

    model, losses, domains = model_and_losses()
    opt = Weighted(torch.optim.SGD(model.parameters(), lr=0.1))
    means = torch.stack([losses[domains == d].mean() for d in range(3)])
    objective = losses.mean() + (means.detach() / 3 * means).sum()
    wanted = torch.autograd.grad(objective, list(model.parameters()), retain_graph=True)
    opt.backward(losses, domains)
    torch.testing.assert_close(gradient(model), torch.cat([g.flatten() for g in wanted]))


class SAM(fastdg.DomainOptimizer):
    """Two forwards a step: the gradient is that from a little way up."""

    looks_at_samples = False
    rho: float = hyper(0.05, check_weight)

    def evaluate_closure(self, forward: Forward) -> Tensor:
        loss = forward.backward()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in moved]).norm()
        ways = [self.rho * p.grad / norm for p in moved]
        with torch.no_grad():
            torch._foreach_add_(moved, ways)
            self.zero_grad()
        forward.backward()
        with torch.no_grad():
            torch._foreach_sub_(moved, ways)
        return loss


@pytest.mark.parametrize("inside", [False, True], ids=["returns", "calls_backward"])
def test_an_algorithm_with_two_forwards(inside: bool) -> None:
    model, twin = Network().double(), Network().double()
    twin.load_state_dict(model.state_dict())
    x, domains = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    opt = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3)
    calls = []

    def losses_of(net: nn.Module) -> Tensor:
        return net(x).square().sum(1)

    def closure() -> Any:
        losses = losses_of(model)
        calls.append(float(losses.detach().mean()))
        return opt.backward(losses, domains) if inside else (losses, domains)

    loss = opt.step(closure)
    parameters = list(twin.parameters())
    grads = torch.autograd.grad(losses_of(twin).mean(), parameters)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, grads, strict=True):
            p += 0.3 * g / norm
    grads = torch.autograd.grad(losses_of(twin).mean(), parameters)
    for p, q, g in zip(model.parameters(), start, grads, strict=True):
        torch.testing.assert_close(p, q - 0.1 * g)
    assert len(calls) == 2 and calls[1] > calls[0] and float(loss) == calls[0]
    assert opt.steps == 1


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1"])
def test_its_arguments_are_checked(value: object) -> None:
    model = Network()
    with pytest.raises(ValueError, match=r"^penalty_weight: "):
        CosinePenalty(torch.optim.SGD(model.parameters(), lr=0.1), penalty_weight=value)
    with pytest.raises(TypeError, match=r"^penalty_wieght: "):
        CosinePenalty(torch.optim.SGD(model.parameters(), lr=0.1), penalty_wieght=1.0)
    assert list(inspect.signature(CosinePenalty).parameters) == [
        "base",
        "penalty_weight",
        "num_domains",
        "model",
        "check",
    ]


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda batch: None, "NoneType"),
        (lambda batch: 1.0, "float"),
        (lambda batch: batch.domain_losses, r"shape \(3,\)"),
        (lambda batch: batch.loss.detach(), "without a graph"),
    ],
)
def test_what_is_no_objective_is_said(returned: Callable[[StepBatch], Any], got: str) -> None:
    class Wrong(fastdg.DomainOptimizer):
        looks_at_samples = False

        def objective(self, batch: StepBatch) -> Tensor:
            return returned(batch)

    model, losses, domains = model_and_losses()
    with pytest.raises(TypeError, match=f"objective: Wrong.*{got}"):
        Wrong(torch.optim.SGD(model.parameters(), lr=0.1)).backward(losses, domains)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_not_declared_is_no_argument() -> None:
    class Undeclared(fastdg.DomainOptimizer):
        strength = 2.0

    base = torch.optim.SGD(Network().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"^strength: .*hyper\("):
        Undeclared(base, strength=3.0)
    with pytest.raises(TypeError, match=r"^DomainOptimizer: "):
        fastdg.DomainOptimizer(base)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda gradients, p: None, "combine: .* got NoneType"),
        (lambda gradients, p: {}, "combine: .* got nothing"),
        (lambda gradients, p: {"weight": p}, "combine: .* no parameter"),
        (lambda gradients, p: {torch.zeros(2): torch.zeros(2)}, "combine: .* no parameter"),
        (lambda gradients, p: {p: torch.zeros(())}, r"combine: .* shape \(\)"),
        (lambda gradients, p: {p: 1.0}, "combine: .* got float"),
    ],
)
def test_what_is_no_combination_is_refused(made: Any, message: str) -> None:
    class Own(GradientCombiner):
        def combine(self, gradients: DomainGradients) -> Combined:
            return made(gradients, next(iter(self._names)))

    model, losses, domains = model_and_losses()
    opt = Own(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=message):
        opt.backward(losses, domains)
    assert all(p.grad is None for p in model.parameters())


def test_a_closure_may_be_followed_by_a_gradient_of_the_algorithms_own() -> None:
    class Signs(fastdg.DomainOptimizer):
        def after_step(self, record: StepRecord) -> None:
            raise AssertionError("there was no objective")

        def evaluate_closure(self, forward: Forward) -> Tensor:
            losses = forward.closure()
            losses.mean().backward()
            for p in self._names:
                p.grad = p.grad.sign()
            return losses.detach().mean()

    model, _, _ = model_and_losses()
    x, y, _ = data(0)
    before = [p.detach().clone() for p in model.parameters()]
    opt = Signs(torch.optim.SGD(model.parameters(), lr=0.25))
    opt.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    for p, was in zip(model.parameters(), before, strict=True):
        moved = (was - p).detach()
        torch.testing.assert_close(moved, 0.25 * moved.sign())
    assert opt.steps == 1


@pytest.mark.parametrize("asked", ["agreement gram", "gram agreement", "weighted_sum weighted_sum"])
def test_gradients_are_used_up_once(asked: str) -> None:
    arguments = {"agreement": ("mean",), "gram": (), "weighted_sum": (torch.ones(3) / 3,)}

    class Own(GradientCombiner):
        def combine(self, gradients: DomainGradients) -> Combined:
            first, second = asked.split()
            getattr(gradients, first)(*arguments[first])
            return getattr(gradients, second)(*arguments[second])

    model, losses, domains = model_and_losses()
    opt = Own(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"^combine: "):
        opt.backward(losses, domains)


def test_a_closure_that_leaves_no_gradient_is_no_step() -> None:
    class Lazy(fastdg.DomainOptimizer):
        def evaluate_closure(self, forward: Forward) -> Tensor:
            return forward.closure().detach().mean()

    model, _, _ = model_and_losses()
    x, y, _ = data(0)
    opt = Lazy(torch.optim.SGD(model.parameters(), lr=0.25))
    with pytest.raises(RuntimeError, match="backward"):
        opt.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
    assert opt.steps == 0
