"""Derivatives of the functional form, with random numbers too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from func_cases import (
    CASES,
    DOMAINS,
    Case,
    D,
    assert_close,
    bare,
    flat,
    gradients,
    moments,
    of_module,
    penalty,
)
from torch import Tensor
from torch.nn import functional as F

from fastdg import func


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("make", CASES)
def test_derivatives(make: Callable[[], Case], chunk_size: int | None) -> None:
    """By parameters and batch, against double backward through one-by-one gradients."""
    case = make()
    loss, params, batch, _ = case
    given: dict[str, Any] = {"domains": DOMAINS, "num_domains": D, "chunk_size": chunk_size}
    got_moments = func.domain_moments(loss, params, *batch, **given)
    grads = gradients(case, create_graph=True)
    pairs = {name: moments(g) for name, g in grads.items()}
    G = flat({name: pair[0] for name, pair in pairs.items()})
    samples = func.per_sample_gradients(loss, params, *batch, chunk_size=chunk_size)
    norms = func.per_sample_norms(loss, params, *batch, chunk_size=chunk_size)
    gram = func.domain_gram(loss, params, *batch, **given)
    for got, expected in (
        (penalty(got_moments.variance), penalty({name: pair[1] for name, pair in pairs.items()})),
        (penalty(got_moments.mean), penalty({name: pair[0] for name, pair in pairs.items()})),
        (gram.square().sum(), (G @ G.t()).square().sum()),
        (penalty(samples), penalty(grads)),
        (norms.pow(3).sum(), flat(grads).norm(dim=1).pow(3).sum()),
    ):
        assert_close(got, expected)
        one = torch.autograd.grad(got, case.tensors, retain_graph=True, materialize_grads=True)
        two = torch.autograd.grad(expected, case.tensors, retain_graph=True, materialize_grads=True)
        for a, b in zip(one, two, strict=True):
            assert_close(a, b)


def tiny(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.dropout(torch.tanh(x @ params["w"]), params.get("p", 0.0)).square().sum()


def test_derivatives_by_finite_differences() -> None:
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 2, 0, 0])

    def variance(w: Tensor, x: Tensor) -> Tensor:
        return func.domain_moments(tiny, {"w": w}, x, domains=ids, chunk_size=3).variance["w"]

    def norms(w: Tensor, x: Tensor) -> Tensor:
        return func.per_sample_norms(tiny, {"w": w}, x, chunk_size=3)

    assert torch.autograd.gradcheck(variance, (w, x))
    assert torch.autograd.gradcheck(norms, (w, x))
    # torch.func differentiates it too
    got = torch.func.grad(lambda w: variance(w, x).square().sum())(w)
    assert_close(got, torch.autograd.grad(variance(w, x).square().sum(), w)[0])


def test_only_what_requires_a_gradient_has_one() -> None:
    case = bare()
    params = {**case.params, "w": case.params["w"].detach()}
    x = case.batch[0].detach()
    norms = func.per_sample_norms(case.loss, params, x, chunk_size=2)
    norms.sum().backward()
    assert params["w"].grad is None and params["scale"].grad is not None
    frozen = {name: p.detach() for name, p in params.items()}
    assert not func.per_sample_norms(case.loss, frozen, x).requires_grad


def test_norms_of_zero_have_gradient_zero() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    x[1] = 0
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    norms = func.per_sample_norms(tiny, {"w": w}, x)
    assert norms[1] == 0
    (got,) = torch.autograd.grad(norms[1], w)
    assert not got.any()


def test_a_second_derivative_is_refused_in_words() -> None:
    case = of_module()
    got = func.domain_moments(case.loss, case.params, *case.batch, domains=DOMAINS)
    (first,) = torch.autograd.grad(penalty(got.variance), case.tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^fastdg::moments_backward "):
        first.sum().backward()


# -- random numbers --


def noisy(w: Tensor, x: Tensor, randomness: str, chunk_size: int | None = 2) -> Tensor:
    torch.manual_seed(5)
    found = func.domain_moments(
        lambda params, x: tiny({**params, "p": 0.5}, x),
        {"w": w},
        x,
        domains=torch.tensor([0, 1, 0, 0, 0]),
        chunk_size=chunk_size,
        randomness=randomness,  # type: ignore[arg-type]
    )
    return found.variance["w"]


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_a_backward_draws_the_same_numbers(randomness: str) -> None:
    w = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, x: noisy(w, x, randomness), (w, x))
    found = noisy(w, x, randomness)
    torch.rand(3)
    before = torch.get_rng_state()
    found.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_randomness_is_that_of_vmap() -> None:
    w, x = torch.randn(2, 40), torch.randn(1, 2).expand(5, 2)  # equal samples
    assert bool((noisy(w, x, "same") < 1e-12).all())  # over chunks, too
    assert noisy(w, x, "different")[0].any()
    with pytest.raises(RuntimeError, match="randomness"):
        noisy(w, x, "error")
