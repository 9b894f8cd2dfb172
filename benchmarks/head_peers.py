"""Fishr on the head by other means: what DomainBed users run today, and what an expert would write.

All follow DomainBed's formula (biased variances, history with decay 0.95, mean over parameters and
domains). ``make(problem, optimizer)`` returns one training step; the base optimizer decides what of
it is measured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import DOMAINS, Problem
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.optim import Optimizer

WEIGHT = 1e6  # its gradient shows beside the loss's on every model here, so a wrong one is found
DECAY = 0.95
# (features, logits, losses) -> variances of the head's weight and bias, each [D, *shape],
# differentiable
Variances = Callable[[Tensor, Tensor, Tensor], list[Tensor]]


class Still(Optimizer):
    """Does not move: what is left of a step is the price of the gradient and of the history."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__(params, {"lr": 1.0})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        return None


def still(problem: Problem) -> Optimizer:
    return Still(list(problem.model.parameters()))


def adam(problem: Problem) -> Optimizer:
    """DomainBed's optimizer; a rate at which thousands of steps on one batch stay harmless."""
    return torch.optim.Adam(problem.model.parameters(), lr=1e-6)


def plain(problem: Problem, optimizer: Optimizer) -> Callable[[], None]:
    """Training without Fishr."""

    def run() -> None:
        optimizer.zero_grad()
        problem.x.grad = None
        problem.losses().mean().backward()
        optimizer.step()

    return run


def penalised(
    problem: Problem,
    optimizer: Optimizer,
    variances: Variances,
    criterion: nn.Module | None = None,
) -> Callable[[], None]:
    """A step with the penalty on what ``variances`` returns."""
    model = problem.model
    history: list[Tensor] = []
    criterion = criterion or nn.CrossEntropyLoss(reduction="none")

    def run() -> None:
        optimizer.zero_grad()
        problem.x.grad = None
        z = model.features(problem.x)
        logits = model.head(z)
        losses = criterion(logits, problem.y)
        found = variances(z, logits, losses)
        if not history:
            history.extend(torch.zeros_like(v) for v in found)
        gaps = []
        for v, m in zip(found, history, strict=True):
            u = v + m * (DECAY / (1 - DECAY))
            gaps.append((u - u.mean(0)).square().sum())
            m.lerp_(v.detach(), 1 - DECAY)
        numel = sum(v.numel() for v in found)
        (losses.mean() + WEIGHT / numel * torch.stack(gaps).sum()).backward()
        optimizer.step()

    return run


def _of(problem: Problem, grads: list[Tensor]) -> list[Tensor]:
    spans = [rows for (rows,) in problem.spans()]
    centred = [[g[rows] - g[rows].mean(0) for rows in spans] for g in grads]
    return [torch.stack([c.square().mean(0) for c in parts]) for parts in centred]


def by_vmap(problem: Problem) -> Variances:
    """``vmap(grad)`` of the head's loss."""

    def loss(head: tuple[Tensor, Tensor], z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(z[None], *head), y[None])

    def variances(z: Tensor, logits: Tensor, losses: Tensor) -> list[Tensor]:
        head = problem.model.head
        grads = vmap(grad(loss), (None, 0, 0))((head.weight, head.bias), z, problem.y)
        return _of(problem, list(grads))

    return variances


def _errors(problem: Problem, logits: Tensor) -> Tensor:
    return logits.softmax(1) - F.one_hot(problem.y, logits.shape[1])


def by_products(problem: Problem) -> Variances:
    """Every sample's outer product, formed."""

    def variances(z: Tensor, logits: Tensor, losses: Tensor) -> list[Tensor]:
        delta = _errors(problem, logits)
        return _of(problem, [delta.unsqueeze(2) * z.unsqueeze(1), delta])

    return variances


def by_compiled_products(problem: Problem) -> Variances:
    """The same, left to ``torch.compile``, which need not form them."""

    @torch.compile
    def of(z: Tensor, delta: Tensor) -> list[Tensor]:
        return _of(problem, [delta.unsqueeze(2) * z.unsqueeze(1), delta])

    return lambda z, logits, losses: of(z, _errors(problem, logits))


def by_squares(problem: Problem) -> Variances:
    """Two products of matrices for each domain: the closed form, in plain PyTorch."""

    def variances(z: Tensor, logits: Tensor, losses: Tensor) -> list[Tensor]:
        delta = _errors(problem, logits)
        weight = []
        for (rows,) in problem.spans():
            d, x = delta[rows], z[rows]
            n = d.shape[0]
            weight.append(d.square().t() @ x.square() / n - (d.t() @ x / n).square())
        return [torch.stack(weight), *_of(problem, [delta])]

    return variances


def backpack_step(problem: Problem, optimizer: Optimizer) -> Callable[[], None]:
    """DomainBed's way, repaired: on current PyTorch the head's input has to be among ``inputs``."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    head = extend(problem.model.head)
    criterion = extend(nn.CrossEntropyLoss(reduction="none"))

    def variances(z: Tensor, logits: Tensor, losses: Tensor) -> list[Tensor]:
        with backpack(BatchGrad()):
            losses.sum().backward(
                inputs=[*head.parameters(), z], retain_graph=True, create_graph=True
            )
        found = _of(problem, [head.weight.grad_batch.clone(), head.bias.grad_batch.clone()])
        optimizer.zero_grad()
        problem.x.grad = None
        for p in head.parameters():
            del p.grad_batch
        return found

    return penalised(problem, optimizer, variances, criterion)


def truth(problem: Problem) -> dict[str, Tensor]:
    """Gradients of the first step (no history yet) from per-sample gradients in float64."""
    model = problem.model.double()
    x = problem.x.detach().double().requires_grad_(problem.x.requires_grad)
    exact = Problem(problem.name, model, x, problem.y, problem.domains)
    z = model.features(x)
    logits = model.head(z)
    found = by_vmap(exact)(z, logits, logits)
    loss = F.cross_entropy(logits, problem.y)
    gaps = torch.stack([(v - v.mean(0)).square().sum() for v in found]).sum()
    numel = sum(v.numel() for v in found)
    assert all(v.shape[0] == DOMAINS for v in found)
    wanted = exact.parameters | ({"features": x} if x.requires_grad else {})
    grads = torch.autograd.grad(loss + WEIGHT / numel * gaps, list(wanted.values()))
    return dict(zip(wanted, grads, strict=True))


def gradients(problem: Problem) -> dict[str, Tensor]:
    """What a step left in ``.grad``."""
    wanted = problem.parameters | ({"features": problem.x} if problem.x.requires_grad else {})
    return {name: p.grad for name, p in wanted.items() if p.grad is not None}
