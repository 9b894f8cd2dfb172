"""Steps of PCGrad, AgrSum and Fishr on all parameters, beside their formulas in float64.

What is compared is ``.grad`` after ``opt.backward``. The truth is made of the samples' gradients,
each from a backward of its own; that of Fishr's penalty of a second derivative for each sample.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

import fastdg

Gradients = dict[str, Tensor]  # of each parameter: of samples [N, *shape], or one gradient
ALGORITHMS = ("PCGrad", "AgrSum", "Fishr")
ORDERS = 5  # the seed of the orders in which PCGrad projects


def domain_means(samples: Mapping[str, Tensor], domains: Tensor) -> list[Gradients]:
    """The mean gradient of each domain."""
    rows = [domains == d for d in range(int(domains.max()) + 1)]
    return [{name: g[row].mean(0) for name, g in samples.items()} for row in rows]


def pcgrad(means: list[Gradients]) -> Gradients:
    """Each domain's gradient, projected on the plane of each that it conflicts with; their mean.

    The orders are drawn as `fastdg.PCGrad` draws them.
    """
    count = len(means)
    generator = torch.Generator().manual_seed(ORDERS)
    keys = torch.rand((count, count), generator=generator, dtype=torch.float64)
    flat = torch.stack([torch.cat([g.flatten() for g in mean.values()]) for mean in means])
    total = torch.zeros_like(flat[0])
    for i, order in enumerate(keys.argsort(1).tolist()):
        mine = flat[i]
        for j in order:
            product = mine @ flat[j]
            if j != i and product < 0:
                mine = mine - product / flat[j].square().sum() * flat[j]
        total += mine / count
    shapes = {name: g.shape for name, g in means[0].items()}
    parts = total.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def agrsum_error(
    got: Tensor, samples: Tensor, domains: Tensor, size: float, close: float
) -> Tensor:
    """How far each entry is from the domains' mean where their signs agree, and from 0 elsewhere.

    A domain's sign is known where its gradient is above ``close * size``, or where it is 0 in each
    of its samples. Where a sign is not known, as it is one of rounding, both the mean and 0 are
    right: the nearer of them counts.
    """
    rows = [samples[domains == d] for d in range(int(domains.max()) + 1)]
    means = torch.stack([row.mean(0) for row in rows])
    empty = torch.stack([(row == 0).all(0) for row in rows])
    signs = torch.where(empty, 0, means.sign())
    unknown = (means.abs() <= close * size) & ~empty
    known = ~unknown
    mean = means.mean(0)
    # A domain that has nothing there, or two that disagree for sure, decide it
    disagree = empty.any(0) | ((known & (signs > 0)).any(0) & (known & (signs < 0)).any(0))
    from_mean, from_zero = (got - mean).abs(), got.abs()
    either = torch.where(unknown.any(0), torch.minimum(from_mean, from_zero), from_mean)
    return torch.where(disagree, from_zero, either)


def fishr(
    losses: Tensor, samples: Mapping[str, Tensor], parameters: Mapping[str, Tensor], domains: Tensor
) -> Gradients:
    r"""The gradient of Fishr's penalty :math:`P(g_1, \dots, g_N)`:
    :math:`\sum_i (\partial g_i / \partial \theta)^\top \partial P / \partial g_i`, one sample after
    the other.

    Args:
        losses: ``[N]`` with a graph that has second derivatives.
        samples: the gradients :math:`g_i`, known already.
        parameters: by the same names.
        domains: of the samples.
    """
    leaves = {name: g.clone().requires_grad_() for name, g in samples.items()}
    rows = [domains == d for d in range(int(domains.max()) + 1)]
    entries = sum(g[0].numel() for g in leaves.values())
    penalty: Tensor | float = 0.0
    for g in leaves.values():
        variance = torch.stack([(g[r] - g[r].mean(0)).square().mean(0) for r in rows])
        penalty = penalty + (variance - variance.mean(0)).square().sum() / (len(rows) * entries)
    assert isinstance(penalty, Tensor)
    toward = dict(zip(leaves, torch.autograd.grad(penalty, list(leaves.values())), strict=True))
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i, loss in enumerate(losses):
        if not any(bool(t[i].any()) for t in toward.values()):
            continue  # a sample that is its domain's only one
        tensors = [parameters[name] for name in toward]
        first = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
        pairs = [
            (g, t[i])
            for g, t in zip(first, toward.values(), strict=True)
            if g is not None and g.requires_grad
        ]
        if pairs:
            outputs, weights = zip(*pairs, strict=True)
            second = torch.autograd.grad(
                outputs, tensors, weights, retain_graph=True, allow_unused=True
            )
            for name, h in zip(toward, second, strict=True):
                if h is not None:
                    total[name] += h.to_dense() if h.is_sparse else h
    return total


def stepped(make: Callable[..., Any], model: nn.Module, losses: Tensor, domains: Tensor) -> Any:
    """``.grad`` after the backward of a wrapper, by name; None where there is none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    opt = make(SGD(list(named.values()), lr=0.1), num_domains=int(domains.max()) + 1, model=model)
    opt.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "params: .* one call of autograd", UserWarning)
        opt.backward(losses, domains)
    found = {name: p.grad for name, p in named.items()}
    opt.zero_grad()
    return found


def pcgrad_of_fastdg(base: Any, **given: Any) -> Any:
    return fastdg.PCGrad(base, generator=torch.Generator().manual_seed(ORDERS), **given)


def fishr_of_fastdg(weight: float) -> Callable[..., Any]:
    """Fishr on all parameters, from its first step on."""

    def make(base: Any, **given: Any) -> Any:
        return fastdg.Fishr(
            base,
            params="all",
            penalty_weight=weight,
            anneal_steps=0,
            ema=None,
            reset_base=False,
            **given,
        )

    return make


def without_second_derivative(error: Exception) -> str | None:
    """The operation that has none, where autograd itself says so."""
    for words in (
        r"derivative for '?([\w:]+)'? is not implemented",
        r"(\w+)\(\): functions with out=... arguments don't support automatic differentiation",
    ):
        if found := re.search(words, str(error)):
            return found[1].removeprefix("aten::")
    return None
