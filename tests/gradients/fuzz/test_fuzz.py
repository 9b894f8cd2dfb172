"""Random models over several steps of one process, always against a loop of plain autograd.

``FASTDG_FUZZ_STEPS=10000 pytest tests/gradients/fuzz`` runs more, here, under wrappers and in other
dtypes, from model ``FASTDG_FUZZ_BEGIN`` on; a failure prints what makes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from fuzz_models import FIRST, Case, begin, compare, losses_of
from fuzz_operations import Weights
from oracle import one_by_one
from torch import Tensor

import fastdg


def differing(case: Case) -> str | None:
    """What is wrong first in the steps of a model, if anything."""
    torch.manual_seed(case.seed)
    weights = Weights()
    for step in case.steps:
        begin(case, weights, step)
        losses, domains = losses_of(case, weights, step)
        try:
            if wrong := _differing(weights, losses, domains, step % 2 == 1):
                return f"step {step}: {wrong}"
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"step {step}: {type(error).__name__}: {error}"
    return None


def _differing(weights: Weights, losses: Tensor, domains: Tensor, twice: bool) -> str | None:
    named = {name: p for name, p in weights.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    each = one_by_one(losses, named, twice)
    derivatives: Sequence[Tensor] = ()
    if twice:
        try:
            derivatives = torch.autograd.grad(
                _scalar([_moments(g, domains)[1] for g in each.values()]),
                parameters,
                retain_graph=True,
                materialize_grads=True,
            )
        except NotImplementedError:  # nor has plain autograd a second derivative
            twice, each = False, one_by_one(losses, named, False)
    moments = fastdg.domain_moments(
        losses, domains, params=named, num_domains=3, create_graph=twice
    )
    got = fastdg.domain_gradients(losses, domains, params=named, num_domains=3)
    squares = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in each.values()]).sum(0)
    pairs = [(fastdg.per_sample_norms(losses, params=named), squares.sqrt(), "norms")]
    for name, g in each.items():
        mean, variance = _moments(g, domains)
        if name not in got:
            pairs.append((torch.zeros_like(mean), mean, f"{name}, left out"))
            continue
        pairs.append((got[name], mean, f"gradients of {name}"))
        pairs.append((moments.mean[name], mean, f"means of {name}"))
        pairs.append((moments.variance[name], variance, f"variances of {name}"))
    if twice:
        made = _scalar(
            [moments.variance.get(n, torch.zeros(3, *p.shape)) for n, p in named.items()]
        )
        found = torch.autograd.grad(made, parameters, materialize_grads=True)
        pairs += [
            (a, b, f"derivative by {n}") for a, b, n in zip(found, derivatives, named, strict=True)
        ]
    for a, b, what in pairs:
        size = max(1.0, float(b.detach().abs().max()))
        off = float((a - b).detach().abs().max())
        if not off <= (1e-5 if weights.rounded else 1e-8) * size:
            return f"{what}: off by {off:.1e} of {size:.1e}"
    return None


def _scalar(variances: Sequence[Tensor]) -> Tensor:
    """Some number whose gradient tells all entries apart."""
    total = sum(v.flatten() @ torch.linspace(0.5, 1.5, v.numel()) for v in variances)
    zero = torch.zeros((), requires_grad=True)  # where the gradients are constants
    return total + zero * 1


def _moments(g: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
    means, variances = [], []
    for d in range(3):
        of_one = g[domains == d]
        centre = of_one.sum(0) / max(1, len(of_one))
        means.append(centre)
        variances.append((of_one - centre).square().sum(0) / max(1, len(of_one)))
    return torch.stack(means), torch.stack(variances)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", FIRST)
def test_random_models(first: int) -> None:
    compare(first, Case.of, differing)
