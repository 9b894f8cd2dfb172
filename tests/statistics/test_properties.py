"""What must hold whatever the numbers: symmetries, merging, no traces left, nothing kept alive."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, naive_moments, one_by_one, trainable
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg.statistics.moments import DomainMoments, merge


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Net(nn.Module):
    """A little of everything: a convolution, a table, a norm, a module without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.table = nn.Embedding(5, 4)
        self.own = nn.PReLU(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = self.norm(self.conv(x.unsqueeze(1))).relu().mean(2)
        return self.head(self.own(y + self.table(tokens).sum(1)))


def moments(
    model: nn.Module,
    x: Tensor,
    tokens: Tensor,
    y: Tensor,
    domains: Tensor,
    num_domains: int,
    scale: float = 1.0,
) -> DomainMoments:
    with fastdg.record(model, check=False) as tape:
        losses = F.cross_entropy(model(x, tokens), y, reduction="none") * scale
    return fastdg.domain_moments(tape, losses, domains, num_domains=num_domains)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Inputs, tokens, targets, domain ids (some domains empty) and their number."""
    samples = draw(st.integers(1, 9))
    num_domains = draw(st.integers(1, 5))
    ids = st.integers(0, num_domains - 1)
    domains = torch.tensor(draw(st.lists(ids, min_size=samples, max_size=samples)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    size = 10.0 ** draw(st.integers(-6, 6))
    x, tokens = torch.randn(samples, 6) * size, torch.randint(0, 5, (samples, 3))
    return x, tokens, torch.randint(0, 3, (samples,)), domains, num_domains


@given(batches(), st.randoms(use_true_random=False), st.floats(-1e3, 1e3))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_symmetries(batch, random, scale: float) -> None:  # type: ignore[no-untyped-def]
    *inputs, domains, D = batch
    model = Net()
    base = moments(model, *inputs, domains, D)

    shuffled = torch.tensor(random.sample(range(len(domains)), len(domains)))
    other = moments(model, *(part[shuffled] for part in inputs), domains[shuffled], D)
    relabel = torch.tensor(random.sample(range(D), D))
    renamed = moments(model, *inputs, relabel[domains], D)
    scaled = moments(model, *inputs, domains, D, scale=scale)

    assert base.count.tolist() == torch.bincount(domains, minlength=D).tolist()
    assert torch.equal(renamed.count[relabel], base.count)
    for name, v in base.variance.items():
        m = base.mean[name]
        assert bool((v >= 0).all())
        assert bool((v[base.count <= 1] == 0).all())
        assert bool((m[base.count == 0] == 0).all())
        size = (m.square().max() + v.max()).clamp(min=1e-30)
        assert_close(other.variance[name] / size, v / size, f"{name}: permuted")
        assert_close(other.mean[name], m, f"{name}: permuted", 1e-10)
        assert_close(renamed.variance[name][relabel] / size, v / size, f"{name}: renamed")
        assert_close(scaled.variance[name] / size, scale**2 * v / size, f"{name}: scaled", 1e-9)
        assert_close(scaled.mean[name], scale * m, f"{name}: scaled", 1e-9)


@given(batches(), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_merging_pieces_gives_the_whole(batch, first: int, second: int) -> None:  # type: ignore[no-untyped-def]
    *inputs, domains, D = batch
    model = Net()
    whole = moments(model, *inputs, domains, D)
    cuts = sorted({0, min(first, len(domains)), min(second, len(domains)), len(domains)})
    parts = [
        moments(model, *(part[a:b] for part in inputs), domains[a:b], D) for a, b in pairwise(cuts)
    ]
    merged = merge(parts)
    assert torch.equal(merged.count, whole.count)
    for name, v in whole.variance.items():
        size = (whole.mean[name].square().max() + v.max()).clamp(min=1e-30)
        assert_close(merged.mean[name], whole.mean[name], f"{name}: mean", 1e-10)
        assert_close(merged.variance[name] / size, v / size, f"{name}: variance")


def test_merging_batches_that_saw_different_domains_and_layers() -> None:
    grads = torch.randn(7, 3)
    domains = torch.tensor([0, 0, 1, 1, 1, 2, 2])

    def part(rows: slice, num_domains: int, name: str) -> DomainMoments:
        mean, variance = naive_moments({name: grads[rows]}, domains[rows], num_domains)
        count = torch.bincount(domains[rows], minlength=num_domains)
        return DomainMoments(mean, variance, count)

    merged = merge([part(slice(0, 3), 2, "a"), part(slice(3, 7), 3, "a")])
    mean, variance = naive_moments({"a": grads}, domains, 3)
    assert merged.count.tolist() == [2, 3, 2]
    assert merged.present.tolist() == [True] * 3
    assert_close(merged.mean["a"], mean["a"], "mean")
    assert_close(merged.variance["a"], variance["a"], "variance")

    # A parameter that one batch did not use had gradients of zero there
    merged = merge([part(slice(0, 3), 3, "a"), part(slice(3, 7), 3, "b")])
    padded = torch.cat([grads[:3], torch.zeros(4, 3)])
    mean, variance = naive_moments({"a": padded}, domains, 3)
    assert_close(merged.mean["a"], mean["a"], "mean")
    assert_close(merged.variance["a"], variance["a"], "variance")


def test_merging_is_differentiable() -> None:
    grads = torch.randn(6, 3, requires_grad=True)
    domains = torch.tensor([0, 1, 0, 1, 1, 0])

    def of(rows: slice) -> DomainMoments:
        mean, variance = naive_moments({"a": grads[rows]}, domains[rows], 2)
        return DomainMoments(mean, variance, torch.bincount(domains[rows], minlength=2))

    merged = merge([of(slice(0, 2)), of(slice(2, 6))])
    (got,) = torch.autograd.grad(merged.variance["a"].square().sum(), grads)
    (expected,) = torch.autograd.grad(of(slice(0, 6)).variance["a"].square().sum(), grads)
    assert_close(got, expected, "derivative")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_through(value: float) -> None:
    model, x, y = Net(), torch.randn(6, 6), torch.randint(0, 3, (6,))
    tokens, domains = torch.randint(0, 5, (6, 3)), torch.tensor([0, 0, 1, 1, 2, 3])
    for bad, domain in ((2, 1), (4, 2)):  # among others, and alone in its domain
        with fastdg.record(model) as tape:
            factor = torch.ones(6).index_fill(0, torch.tensor(bad), value)
            losses = F.cross_entropy(model(x, tokens), y, reduction="none") * factor
        got = fastdg.domain_moments(tape, losses, domains)
        clean = [d for d in range(4) if d != domain]
        for name in ("conv.weight", "head.weight", "head.bias", "norm.bias"):
            assert not got.variance[name][domain].isfinite().any(), name
            assert got.variance[name][clean].isfinite().all(), name
            assert not got.mean[name][domain].isfinite().any(), name


def test_two_recordings_of_one_forward() -> None:
    model = Net()
    with fastdg.record(model) as one, fastdg.record(model, params="head") as two:
        losses = model(torch.randn(4, 6), torch.zeros(4, 2).long()).sum(1)
    first, second = (fastdg.per_sample_gradients(tape, losses) for tape in (one, two))
    assert set(second) == {"head.weight", "head.bias"}
    for name, g in second.items():
        assert torch.equal(g, first[name])


def test_several_forwards_of_one_recording() -> None:
    """Each has its own losses, asked in any order; what they share they share."""
    model = Net()
    batches = [(torch.randn(n, 6), torch.randint(0, 5, (n, 2))) for n in (4, 3)]
    with fastdg.record(model) as tape:
        losses = [model(*batch).square().sum(1) for batch in batches]
    for part in reversed(losses):
        got = fastdg.per_sample_gradients(tape, part)
        for name, g in one_by_one(part, trainable(model)).items():
            assert_close(got[name], g, name)
