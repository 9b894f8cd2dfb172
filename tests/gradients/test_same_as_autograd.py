"""Forwards that are rare, or hostile: the per-sample gradients are autograd's all the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from functions import Scale
from oracle import DOMAINS, assert_close, assert_statistics, one_by_one
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastdg

N = len(DOMAINS)
X = torch.randn(N, 4, dtype=torch.float64)


class Uses(nn.Module):
    """Parameters ``w`` and what a forward makes of them, above a layer."""

    def __init__(self, run: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.below = nn.Linear(4, 4)
        self.w = nn.ParameterList([nn.Parameter(torch.randn(s) + 0.1) for s in shapes])
        self.run = run

    def losses(self) -> Tensor:
        return self.run(self.below(X), *self.w).flatten(1).sum(1)


def two_rows(x: Tensor) -> Tensor:
    """``[2, N, 2]``: the rows of a sample lie in two products of a batch."""
    return x.unflatten(1, (2, 2)).transpose(0, 1)


MATRICES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "a dimension swapped with itself": (lambda x, w: x @ w.transpose(0, 0), (4, 4)),
    "a dimension swapped with itself, by another name": (
        lambda x, w: x @ w.transpose(-1, 1),
        (4, 3),
    ),
    "a transpose that is copied and seen otherwise": (
        lambda x, w: torch.bmm(two_rows(x), w.t().reshape(1, 2, 3).expand(2, 2, 3)).transpose(0, 1),
        (2, 3),
    ),
    "a transpose that is expanded": (
        lambda x, w: torch.bmm(two_rows(x), w.t().expand(2, 2, 3)).transpose(0, 1),
        (3, 2),
    ),
}


@pytest.mark.parametrize("case", MATRICES)
def test_a_matrix_that_is_moved_before_the_product(case: str) -> None:
    run, shape = MATRICES[case]
    model = Uses(lambda x, w: run(x, w).sin(), shape)
    assert_statistics(model, lambda m: m.losses(), twice=False, slow=True)


def test_samples_of_complex_operations_in_single_precision_are_told_apart() -> None:
    x, w = torch.randn(600, 4), nn.Parameter(torch.randn(4))  # 600 powers of two overflow float32
    losses = torch.fft.fft((x * w).float()).abs().double().sum(1)
    expected = one_by_one(losses, {"w": w})["w"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = fastdg.per_sample_gradients(losses, params={"w": w})["w"]
    assert_close(got, expected, "w", 1e-6)


def test_where_leaves_out_gradients_that_are_not_finite() -> None:
    chosen = torch.tensor([True, False, True, False])
    model = Uses(lambda x, w: torch.where(chosen, x.abs() * 0, w.abs() + 1).sqrt(), (4,))
    losses = model.losses()
    (expected,) = torch.autograd.grad(losses.sum(), [model.w[0]], retain_graph=True)
    got = fastdg.per_sample_gradients(losses, params={"w": model.w[0]})["w"]
    assert_close(got.sum(0), expected, "w")


def test_not_a_number_stays_with_its_domain_where_no_rule_knows() -> None:
    model = Uses(lambda x, w: Scale.apply(x, w), (4,))
    weight = torch.ones(N).index_fill(0, torch.tensor([1]), torch.nan)
    losses, params = model.losses() * weight, {"w": model.w[0]}
    with pytest.warns(UserWarning, match=r"^params: "):
        gradients = fastdg.domain_gradients(losses, DOMAINS, params=params)["w"]
        variance = fastdg.domain_moments(losses, DOMAINS, params=params).variance["w"]
        norms = fastdg.per_sample_norms(losses, params=params)
    its_own = torch.arange(int(DOMAINS.max()) + 1) == DOMAINS[1]
    assert torch.equal(gradients.isnan().any(1), its_own)
    assert torch.equal(variance.isnan().any(1), its_own)
    assert torch.equal(norms.isnan(), weight.isnan())


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_runs_once_though_an_input_of_its_first_layer_is_none(bias: bool) -> None:
    runs = 0
    norm, layer = nn.LayerNorm(4, bias=bias), nn.Linear(4, 4)

    def block(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return layer(norm(x)).tanh()

    params = [*norm.parameters(), *layer.parameters()]
    for _ in range(3):  # the third step has its plan from before
        losses = checkpoint(block, X, use_reentrant=False).sum(1)
        runs = 0
        fastdg.domain_gradients(losses, DOMAINS, params=params)
    assert runs == 1 + 1  # one for the tensors that rules read, one for the backward itself


def test_the_variance_of_a_row_that_all_samples_read_is_centred_first() -> None:
    table = nn.Embedding(5, 4, dtype=torch.float32)
    scale = (1 + 1e-4 * torch.randn(64, 4)).float()
    ids = torch.zeros(64, 1, dtype=torch.int64)
    losses = (table(ids)[:, 0] * scale).sum(1)
    variance = fastdg.domain_moments(losses, torch.zeros(64, dtype=torch.int64), params=table)
    expected = scale.double().var(0, unbiased=False)
    assert_close(variance.variance["weight"][0, 0] / expected, torch.ones(4), "variance", 1e-3)


SHARED = nn.Linear(4, 4).double()


def used_twice(layer: nn.Linear, *inputs: Tensor) -> Tensor:
    return layer(inputs[0]).sin()


@pytest.mark.parametrize("params", ["all", "head"])
@pytest.mark.parametrize(
    "run",
    [
        SHARED,
        SHARED.forward,
        partial(used_twice, SHARED),
        lambda x: SHARED(x).sin(),
        (lambda layer: lambda x: layer(x).sin())(SHARED),
        lambda x, layers=(SHARED,): layers[0](x),
    ],
    ids=["module", "method", "partial", "global", "closure", "default"],
)
def test_a_layer_also_inside_a_reentrant_checkpoint_is_not_half_served(
    run: Callable[[Tensor], Tensor], params: str
) -> None:
    with fastdg.record(SHARED, params) as tape:
        losses = SHARED(checkpoint(run, X.clone().requires_grad_(), use_reentrant=True)).sum(1)
    with pytest.raises(RuntimeError, match=r"^params: .*use_reentrant=True.*weight"):
        fastdg.domain_gradients(tape, losses, DOMAINS)


def test_a_layer_above_a_reentrant_checkpoint_is_served() -> None:
    head, block = nn.Linear(4, 3), nn.Linear(4, 4)
    losses = head(checkpoint(block, X.clone().requires_grad_(), use_reentrant=True)).sum(1)
    expected = one_by_one(losses, {"weight": head.weight})
    got = fastdg.per_sample_gradients(losses, params=head)
    assert_close(got["weight"], expected["weight"], "weight")
