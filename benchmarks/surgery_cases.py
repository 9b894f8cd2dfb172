"""Whole steps of gradient surgery: ours, the papers' way, and what an expert would write.

The papers run one forward and backward a domain, copy the gradients into a flat vector each, and
combine those. ``make(problem)`` returns one training step with Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from head_peers import adam
from models import Problem
from torch import Tensor
from torch.nn import functional as F

import fastdg

Run = Callable[[], Any]
Lists = list[list[Tensor]]  # a domain's gradients, one a parameter
Wrapper = Callable[..., fastdg.DomainOptimizer]


def spread(problem: Problem, domains: int) -> Problem:
    """``problem`` with its samples in ``domains`` domains, one after the other."""
    rows = torch.arange(problem.samples)
    problem.domains = rows * domains // problem.samples
    return problem


def ours(
    wrapper: Wrapper, domains: int, optimizer: Callable[[Problem], Any] = adam
) -> Callable[[Problem], Run]:
    def make(on: Problem) -> Run:
        spread(on, domains)
        opt = wrapper(optimizer(on), num_domains=domains, check=False)

        def run() -> None:
            opt.zero_grad()
            opt.backward(on.losses(), on.domains)
            opt.step()

        return run

    return make


def by_domain(on: Problem, domains: int) -> Lists:
    """One forward and backward a domain."""
    parameters, found = list(on.model.parameters()), []
    for d in range(domains):
        rows = on.domains == d
        loss = F.cross_entropy(on.model(on.x[rows]), on.y[rows])
        found.append(list(torch.autograd.grad(loss, parameters)))
    return found


def peer(combine: Callable[[Lists], Sequence[Tensor]], domains: int) -> Callable[[Problem], Run]:
    """A step along what ``combine`` makes of the domains' gradients."""

    def make(on: Problem) -> Run:
        spread(on, domains)
        optimizer = adam(on)
        parameters = list(on.model.parameters())

        def run() -> None:
            for p, grad in zip(parameters, combine(by_domain(on, domains)), strict=True):
                p.grad = grad
            optimizer.step()

        return run

    return make


def torchjd_pcgrad(domains: int) -> Callable[[Problem, tuple[int, bool]], Run]:
    """One forward of the mixed batch, then the domains' backwards, some at a time; the Gram matrix
    of the whole Jacobian or summed up over the parameters."""

    def make(on: Problem, setting: tuple[int, bool]) -> Run:
        from torchjd import aggregation, autojac

        chunk, summed = setting

        spread(on, domains)
        optimizer, combine = adam(on), aggregation.PCGrad()
        parameters = list(on.model.parameters())
        rows = [on.domains == d for d in range(domains)]

        def run() -> None:
            optimizer.zero_grad()
            losses = on.losses()
            autojac.backward(
                [losses[row].mean() / domains for row in rows],  # it adds them up
                inputs=parameters,
                parallel_chunk_size=chunk,
            )
            autojac.jac_to_grad(parameters, combine, optimize_gramian_computation=summed)
            optimizer.step()

        return run

    return make


# ---- how the gradients are combined ----


def agreement_flat(gradients: Lists) -> Sequence[Tensor]:
    """As the paper's code does it: flat vectors, signs stacked."""
    rows = torch.stack([torch.cat([g.flatten() for g in domain]) for domain in gradients])
    agree = rows.sign().sum(0).abs() == len(rows)
    return _shaped(torch.where(agree, rows.mean(0), 0), gradients[0])


def agreement_each(gradients: Lists) -> Sequence[Tensor]:
    """Tensor by tensor."""
    out = []
    for column in zip(*gradients, strict=True):
        rows = torch.stack(column)
        out.append(torch.where(rows.sign().sum(0).abs() == len(rows), rows.mean(0), 0))
    return out


def mask_each(gradients: Lists) -> Sequence[Tensor]:
    """DomainBed's ANDMask."""
    out = []
    for column in zip(*gradients, strict=True):
        rows = torch.stack(column)
        mask = (rows.sign().mean(0).abs() >= 1).to(rows.dtype)
        out.append(mask * rows.mean(0) / (1e-10 + mask.mean()))
    return out


def projection_flat(gradients: Lists) -> Sequence[Tensor]:
    """As the paper's code does it: a product and a projection for each pair, in order."""
    rows = torch.stack([torch.cat([g.flatten() for g in domain]) for domain in gradients])
    total = torch.zeros_like(rows[0])
    for i, row in enumerate(rows):
        kept = row.clone()
        for j, other in enumerate(rows):
            product = kept @ other
            if i != j and product < 0:
                kept -= product / (other @ other) * other
        total += kept
    return _shaped(total / len(rows), gradients[0])


def projection_gram(gradients: Lists) -> Sequence[Tensor]:
    """The same decided by the Gram matrix, tensor by tensor."""
    columns = [torch.stack(column).flatten(1) for column in zip(*gradients, strict=True)]
    gram = torch.stack([rows @ rows.t() for rows in columns]).sum(0)
    mean = projection_weights(gram).to(columns[0].dtype)
    return [(mean @ rows).view_as(g) for rows, g in zip(columns, gradients[0], strict=True)]


def projection_weights(gram: Tensor) -> Tensor:
    """Each domain's share in the mean of the projected gradients, in float64."""
    gram = gram.double()
    weights = torch.eye(len(gram), dtype=torch.float64)
    for i in range(len(gram)):
        for j in range(len(gram)):
            product = weights[i] @ gram[j]
            if i != j and product < 0:
                weights[i, j] -= product / gram[j, j]
    return weights.mean(0)


def _shaped(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([g.numel() for g in like])
    return [part.view_as(g) for part, g in zip(parts, like, strict=True)]


def truth(combine: Callable[[Lists], Sequence[Tensor]], domains: int) -> Any:
    """The final gradient in float64, by name."""

    def found(on: Problem) -> Mapping[str, Tensor]:
        spread(on, domains)
        return dict(zip(on.parameters, combine(by_domain(on, domains)), strict=True))

    return found


def gradients(on: Problem, out: Any) -> Mapping[str, Tensor]:
    return {name: p.grad for name, p in on.parameters.items() if p.grad is not None}
