"""The functional form: its values, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from func_cases import (
    CASES,
    CHUNKS,
    DOMAINS,
    Case,
    D,
    N,
    assert_close,
    flat,
    gradients,
    moments,
    of_module,
    penalty,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg import func


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("make", CASES)
def test_statistics(make: Callable[[], Case], chunk_size: int | None) -> None:
    case = make()
    loss, params, batch, names = case
    grads = gradients(case)
    given: dict[str, Any] = {"domains": DOMAINS, "num_domains": D, "chunk_size": chunk_size}
    got = func.domain_moments(loss, params, *batch, **given)
    means = func.domain_gradients(loss, params, *batch, **given)
    samples = func.per_sample_gradients(loss, params, *batch, chunk_size=chunk_size)
    assert got.count.tolist() == [3, 0, 3, 1, 0]
    for statistic in (got.mean, got.variance, means, samples):
        assert list(statistic) == names
    for name in names:
        mean, variance = moments(grads[name])
        assert_close(samples[name], grads[name])
        assert_close(got.mean[name], mean)
        assert_close(means[name], mean)
        assert_close(got.variance[name], variance)
        assert bool((got.variance[name] >= 0).all()) and not got.variance[name][[1, 3, 4]].any()
    norms = func.per_sample_norms(loss, params, *batch, chunk_size=chunk_size)
    assert_close(norms, flat(grads).norm(dim=1))
    G = flat({name: moments(g)[0] for name, g in grads.items()})
    assert_close(func.domain_gram(loss, params, *batch, **given), G @ G.t())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_domains_of_any_integer_dtype(dtype: torch.dtype) -> None:
    case = of_module()
    expected, got = (
        func.domain_moments(case.loss, case.params, *case.batch, domains=ids, chunk_size=3)
        for ids in (DOMAINS, DOMAINS.to(dtype))
    )
    assert got.present.tolist() == [True, False, True, True]  # one more than the largest id
    for name in case.names:
        assert torch.equal(got.variance[name], expected.variance[name])


def test_agrees_with_the_hooks() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(N, 5).double(), torch.arange(N) % 3
    with fastdg.record(model) as tape:
        losses = F.cross_entropy(model(x), y, reduction="none")
    expected = fastdg.domain_moments(tape, losses, DOMAINS, create_graph=True)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    params = dict(model.named_parameters())
    got = func.domain_moments(loss, params, x, y, domains=DOMAINS, chunk_size=2)
    one, two = (
        torch.autograd.grad(penalty(m.variance), list(params.values())) for m in (got, expected)
    )
    for k, name in enumerate(params):
        assert_close(got.mean[name], expected.mean[name])
        assert_close(got.variance[name], expected.variance[name])
        assert_close(one[k], two[k])


def test_accuracy_in_single_precision() -> None:
    case = of_module(torch.float32)
    got = func.domain_moments(case.loss, case.params, *case.batch, domains=DOMAINS, num_domains=D)
    samples = func.per_sample_gradients(case.loss, case.params, *case.batch, chunk_size=3)
    got_grads = torch.autograd.grad(penalty(got.variance), case.tensors)
    torch.manual_seed(0)
    exact = of_module()
    params = {n: p.detach().double().requires_grad_() for n, p in case.params.items()}
    x = case.batch[0].detach().double().requires_grad_()
    exact = exact._replace(params=params, batch=(x, case.batch[1]))
    grads = gradients(exact, create_graph=True)
    variance = {name: moments(g)[1] for name, g in grads.items()}
    for name in case.names:
        for tensor in (got.mean[name], got.variance[name], samples[name]):
            assert tensor.dtype == torch.float32
        assert_close(samples[name], grads[name], 1e-5)
        assert_close(got.variance[name], variance[name], 1e-5)
    expected = torch.autograd.grad(penalty(variance), exact.tensors)
    for one, two in zip(got_grads, expected, strict=True):
        assert_close(one, two, 1e-5)


def test_half_precision_parameters_have_fp32_statistics() -> None:
    case = of_module(torch.bfloat16)
    got = func.domain_moments(case.loss, case.params, *case.batch, domains=DOMAINS, chunk_size=3)
    assert {v.dtype for v in (*got.mean.values(), *got.variance.values())} == {torch.float32}
    grads = torch.autograd.grad(penalty(got.variance), case.tensors)
    assert {g.dtype for g in grads} == {torch.bfloat16}


@pytest.mark.parametrize("chunk_size", [1, 3, N])
def test_a_nan_loss_stays_in_its_domain(chunk_size: int) -> None:
    case = of_module()
    x, y = case.batch[0].detach(), case.batch[1]
    given: dict[str, Any] = {"domains": DOMAINS, "num_domains": D, "chunk_size": chunk_size}
    clean = func.domain_moments(case.loss, case.params, x, y, **given)
    bad = x.clone()
    bad[3] = float("nan")  # of domain 2
    got = func.domain_moments(case.loss, case.params, bad, y, **given)
    for one, two in ((got.mean, clean.mean), (got.variance, clean.variance)):
        for name in case.names:
            assert bool(one[name][2].isnan().all())
            others = [0, 1, 3, 4]
            assert torch.equal(one[name][others], two[name][others])
    norms = func.per_sample_norms(case.loss, case.params, bad, y, chunk_size=chunk_size)
    assert norms.isnan().nonzero().flatten().tolist() == [3]


# -- what is refused --


def mean_of(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x @ params["w"]).mean()


W, X = torch.randn(3, 2), torch.randn(4, 3)
CAPTURED = torch.randn(3, requires_grad=True)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (0.5, TypeError, "^loss: .*got float"),
        (lambda p, x: 1.0, TypeError, "^loss: .*got float"),
        (lambda p, x: x @ p["w"], ValueError, r"^loss: .*got shape \(2,\)"),
        (lambda p, x: (x @ p["w"]).sum().long(), TypeError, "^loss: "),
        (lambda p, x: (x @ p["w"]).sum() * CAPTURED[0], ValueError, r"loss: .*one outside of them"),
    ],
)
def test_bad_losses(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        func.per_sample_norms(loss, {"w": W}, X)


def test_captured_tensors_are_fine_for_values() -> None:
    with torch.no_grad():
        got = func.per_sample_norms(lambda p, x: mean_of(p, x * CAPTURED), {"w": W}, X)
    expected = func.per_sample_norms(lambda p, x: mean_of(p, x * CAPTURED.detach()), {"w": W}, X)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (nn.Linear(3, 2), TypeError, r"params: .*, got Linear.* dict\(model.named_parameters"),
        (W, TypeError, "^params: .*got Tensor"),
        ({"w": 3.0}, TypeError, r"params\['w'\]: expected a tensor, got float"),
        ({"w": W, "n": {"b": None}}, TypeError, r"params\['n.b'\]: .*, got NoneType"),
        ({"w": W.long()}, TypeError, r"params\['w'\]: expected a floating dtype, got torch.int64"),
        ({"a": {"b": W}, "a.b": W}, ValueError, "^params: .*'a.b'"),
        ({}, ValueError, "^params: .*got none"),
    ],
)
def test_bad_params(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        func.per_sample_gradients(mean_of, params, X)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((), ValueError, "^batch: "),
        ((X, 0.5), TypeError, "batch: .*, got float"),
        ((X, torch.tensor(1.0)), ValueError, "^batch: .*got a 0-dim tensor"),
        ((X, torch.randn(3)), ValueError, r"^batch: .*got \[4, 3\]"),
        ((X[:0],), ValueError, "^batch: .*got an empty batch"),
    ],
)
def test_bad_batches(batch: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        func.per_sample_norms(mean_of, {"w": W}, *batch)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "^chunk_size: .*got 0"),
        ({"chunk_size": 2.0}, ValueError, "^chunk_size: .*got 2.0"),
        ({"chunk_size": True}, ValueError, "^chunk_size: .*got True"),
        ({"randomness": "some"}, ValueError, "^randomness: "),
        ({"domains": torch.zeros(3).long()}, ValueError, "^domains: "),
        ({"domains": torch.zeros(4)}, TypeError, "^domains: "),
        ({"domains": torch.tensor([0, 1, -1, 0])}, ValueError, "^domains: "),
        ({"num_domains": 0}, ValueError, "^num_domains: "),
        ({"domains": torch.arange(4), "num_domains": 3}, ValueError, "^domains: .*num_domains=3"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"domains": torch.zeros(4).long(), **options}
    for statistic in (func.domain_moments, func.domain_gradients, func.domain_gram):
        with pytest.raises(error, match=message):
            statistic(mean_of, {"w": W}, X, **given)
