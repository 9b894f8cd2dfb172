"""The truth in float64: one backward pass a sample, or ``torch.func``; made without fastdg."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import fastdg
from fastdg.domains import partition
from fastdg.factors import Agreement, PerSampleGrad

# Empty domains in the middle (1) and at the end (4), and one of a single sample (3).
DOMAINS = torch.tensor([0, 2, 0, 2, 3, 0])
NUM_DOMAINS = 5
SLOW = "params: .* take one call of autograd for each domain"

Gradients = dict[str, Tensor]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def one_by_one(
    losses: Tensor, parameters: Mapping[str, Tensor], create_graph: bool = False
) -> Gradients:
    """Per-sample gradients ``[N, *shape]`` from one backward pass a sample; zeros where unused."""
    rows = [
        torch.autograd.grad(
            loss,
            list(parameters.values()),
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        for loss in losses
    ]

    def dense(row: Tensor | None, like: Tensor) -> Tensor:
        if row is None:
            return torch.zeros_like(like)
        return row.to_dense() if row.is_sparse else row

    return {
        name: torch.stack([dense(row[k], p) for row in rows])
        for k, (name, p) in enumerate(parameters.items())
    }


def functional(model: nn.Module, loss: Callable[..., Tensor], batch: Sequence[Tensor]) -> Gradients:
    """Per-sample gradients of ``loss(model(x), *targets)``, ``batch = (x, *targets)``."""

    def one(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        x, *targets = (part.unsqueeze(0) for part in sample)
        return loss(torch.func.functional_call(model, parameters, (x,)), *targets).sum()

    in_dims = (None, *[0] * len(batch))
    gradient = torch.func.grad(one)
    return torch.func.vmap(gradient, in_dims)(dict(trainable(model)), *batch)


def naive_moments(
    grads: Mapping[str, Tensor], domains: Tensor, num_domains: int
) -> tuple[Gradients, Gradients]:
    """Mean and biased variance of each domain, zeros for an empty one; differentiable."""
    mean, variance = {}, {}
    for name, g in grads.items():
        means, variances = [], []
        for d in range(num_domains):
            rows = g[domains == d]
            centre = rows.mean(0) if len(rows) else torch.zeros_like(g[0])
            means.append(centre)
            variances.append((rows - centre).square().sum(0) / max(1, len(rows)))
        mean[name], variance[name] = torch.stack(means), torch.stack(variances)
    return mean, variance


def scalar_of(variance: Mapping[str, Tensor]) -> Tensor:
    """Some scalar whose gradient tells every entry of every variance apart."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(variance):
        v = variance[name].double()
        c = torch.rand(v.shape, generator=generator, dtype=torch.float64)
        total = total + ((0.5 + c) * v).sum() + (c * v).square().sum()
    return total


def assert_close(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} != {tuple(expected.shape)}"
    error = (
        float((got.detach().double() - expected.detach().double()).abs().max())
        if got.numel()
        else 0.0
    )
    size = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    assert error <= tolerance * size, f"{what}: off by {error:.2e} of {size:.2e}"


def assert_statistics(
    model: nn.Module,
    losses_of: Callable[[nn.Module], Tensor],
    domains: Tensor = DOMAINS,
    num_domains: int = NUM_DOMAINS,
    *,
    tolerance: float = 1e-12,
    twice: bool = True,
    slow: bool = False,
) -> None:
    """Every statistic of every parameter; with ``twice`` a derivative of the variances too, with
    ``slow`` also where no rule serves some of them, of which users are warned."""
    with warnings.catch_warnings():
        if slow:
            warnings.filterwarnings("ignore", SLOW, UserWarning)
        _assert_statistics(model, losses_of, domains, num_domains, tolerance, twice)


def _assert_statistics(
    model: nn.Module,
    losses_of: Callable[[nn.Module], Tensor],
    domains: Tensor,
    num_domains: int,
    tolerance: float,
    twice: bool,
) -> None:
    parameters = trainable(model)
    with fastdg.record(model) as tape:
        losses = losses_of(model)
    expected = one_by_one(losses, parameters)
    used = {name: g for name, g in expected.items() if g.count_nonzero()}
    got = fastdg.per_sample_gradients(tape, losses)
    assert set(used) <= set(got) <= set(parameters), set(used) ^ set(got)
    expected = {name: expected[name] for name in got}
    for name in got:
        assert_close(got[name], expected[name], f"gradients of {name}", tolerance)

    flat = torch.cat([g.reshape(len(g), -1) for g in expected.values()], 1)
    assert_close(fastdg.per_sample_norms(tape, losses), flat.norm(dim=1), "norms", tolerance)

    mean, variance = naive_moments(expected, domains, num_domains)
    G = torch.cat([m.reshape(len(m), -1) for m in mean.values()], 1)
    gram = fastdg.domain_gram(tape, losses, domains, num_domains=num_domains)
    assert_close(gram, G @ G.t(), "gram", tolerance)
    assert_agreement(tape, losses, mean, domains, num_domains, tolerance)
    by_domain = fastdg.domain_gradients(tape, losses, domains, num_domains=num_domains)
    moments = fastdg.domain_moments(tape, losses, domains, num_domains=num_domains)
    assert moments.count.tolist() == torch.bincount(domains, minlength=num_domains).tolist()
    for name in got:
        assert_close(by_domain[name], mean[name], f"domain gradients of {name}", tolerance)
        assert_close(moments.mean[name], mean[name], f"means of {name}", tolerance)
        assert_close(moments.variance[name], variance[name], f"variances of {name}", tolerance)
        assert bool((moments.variance[name] >= 0).all())
    if twice:
        assert_second_order(model, losses_of, domains, num_domains, tolerance)


def assert_agreement(
    tape: fastdg.Tape,
    losses: Tensor,
    mean: Gradients,
    domains: Tensor,
    num_domains: int,
    tolerance: float,
) -> None:
    """Weighted sums of the domains' gradients where the signs of most of them agree."""
    parts = partition(domains, losses, num_domains)
    present = parts.count > 0
    weights = torch.arange(1, num_domains + 1) * present.to(losses.dtype)
    made: dict[str, Agreement] = {}

    def use(name: str, factor: PerSampleGrad) -> None:
        made[name] = factor.agreement(parts, weights, 0.5, math.inf)

    tape.resolve(losses).collect(use, retain_graph=True)
    for name, got in made.items():
        g = mean[name]
        mask = (g[present].sign().mean(0).abs() >= 0.5).to(g.dtype)
        expected = mask * torch.tensordot(weights.to(g.dtype), g, 1)
        assert_close(got.combined, expected, f"agreement of {name}", tolerance)
        assert_close(got.magnitude, expected.abs().sum(), f"magnitude of {name}", tolerance)
        assert 0 <= float(got.agreeing) <= mask.numel()


def assert_second_order(
    model: nn.Module,
    losses_of: Callable[[nn.Module], Tensor],
    domains: Tensor = DOMAINS,
    num_domains: int = NUM_DOMAINS,
    tolerance: float = 1e-12,
) -> None:
    """A derivative of the variances against double backward through per-sample gradients."""
    parameters = trainable(model)
    with fastdg.record(model) as tape:
        losses = losses_of(model)
    moments = fastdg.domain_moments(
        tape, losses, domains, num_domains=num_domains, create_graph=True
    )
    got = torch.autograd.grad(
        scalar_of(moments.variance),
        list(parameters.values()),
        allow_unused=True,
        retain_graph=True,
    )
    explicit = one_by_one(losses, {n: parameters[n] for n in moments.variance}, create_graph=True)
    expected = torch.autograd.grad(
        scalar_of(naive_moments(explicit, domains, num_domains)[1]),
        list(parameters.values()),
        allow_unused=True,
    )
    for name, one, two in zip(parameters, got, expected, strict=True):
        zero = torch.zeros_like(parameters[name])
        assert_close(
            zero if one is None else one,
            zero if two is None else two,
            f"derivative of the variances by {name}",
            tolerance,
        )
