"""Which sample every entry of a gradient belongs to: exact, or said to be mixed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastdg.gradients.graph import Graph
from fastdg.gradients.ownership.owners import (
    Output,
    Owner,
    OwnerMap,
    Unclear,
    completed,
    compressed,
)
from fastdg.gradients.ownership.provenance import probe


def found_at(losses: Tensor, *tensors: Tensor) -> list[Owner | Unclear | None]:
    assert losses.grad_fn is not None
    outputs = [Output(t.grad_fn, t.output_nr) for t in tensors if t.grad_fn is not None]
    found: OwnerMap = probe(losses, Graph(losses.grad_fn), outputs)
    return [found[output] for output in outputs]


def samples_of(losses: Tensor, tensor: Tensor) -> Tensor:
    """The sample of each entry of the gradient at ``tensor``."""
    (found,) = found_at(losses, tensor)
    assert isinstance(found, Owner), found
    return completed(compressed(found.ids), len(losses)).expand(tensor.shape)


class Bend(nn.Module):
    """Makes every gradient another one; keeps rows apart."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(features, out), nn.Linear(out, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh()).square().sum(-1)


T, C = 5, 4
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # (N, T, C) -> any rows, C last
    "batch first": lambda x: x,
    "sequence first": lambda x: x.transpose(0, 1),
    "folded, batch first": lambda x: x.flatten(0, 1),
    "folded, sequence first": lambda x: x.transpose(0, 1).flatten(0, 1),
    "windows": lambda x: x.unfold(1, 3, 1).transpose(2, 3).flatten(0, 1),
    "rows in any order": lambda x: x.flatten(0, 1)[torch.randperm(x.shape[0] * T)],
    "ragged": lambda x: torch.cat([x[i, : 1 + i % T] for i in range(len(x))]),
    "ragged, missing": lambda x: torch.cat([x[i, : (i + 1) % T] for i in range(len(x))]),
    "two blocks": lambda x: torch.cat([x[:, :2].flatten(0, 1), x[:, 2:].flatten(0, 1)]),
    "samples last": lambda x: x.permute(1, 2, 0),
}


@pytest.mark.parametrize("samples", [1, 3, 129, 300])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[Tensor], Tensor], samples: int) -> None:
    torch.manual_seed(samples)
    state = torch.get_rng_state()
    truth = layout(torch.arange(samples).view(-1, 1, 1).expand(-1, T, C))
    torch.set_rng_state(state)  # the same order of the rows
    gain = nn.Parameter(torch.rand(C))
    x = torch.randn(samples, T, C)
    rows = layout(x * gain).sin()
    each = rows.exp() * torch.rand_like(rows)
    losses = torch.zeros(samples).index_add(0, truth.flatten(), each.flatten())
    ids = samples_of(losses, rows)
    assert torch.equal(ids, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("samples", [6, 96])
@pytest.mark.parametrize("first", [0, 1], ids=["batch first", "sequence first"])
def test_dtypes(first: int, samples: int, dtype: torch.dtype) -> None:
    model = Bend(8, 8).to(dtype)
    rows = (torch.randn(samples, 3, 8).transpose(0, first)).to(dtype)
    h = model.one(rows)
    losses = model.two(h.tanh()).transpose(0, first).float().square().sum((1, 2))
    truth = torch.arange(samples).view(-1, 1, 1).expand(-1, 3, 8).transpose(0, first)
    assert torch.equal(samples_of(losses, h), truth)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e-3, 1e3, 1e15])
def test_gradients_of_any_size(size: float) -> None:
    """Float32 has room for 2**64 above and below most of these, and for none of the rest."""
    model = Bend(4, 6).float()
    h = model.one(torch.randn(96, 3, 4, dtype=torch.float32))
    losses = model.two(h.tanh()).square().sum((1, 2)) * size
    ids = samples_of(losses, h)
    assert torch.equal(ids, torch.arange(96).view(-1, 1, 1).expand(-1, 3, 6))


def test_each_entry_its_own_sample() -> None:
    """No row, no column belongs to one sample alone."""
    truth = torch.randperm(24) % 6
    entries = (torch.randn(4, 6) * nn.Parameter(torch.rand(()))).sin()
    losses = torch.zeros(6).index_add(0, truth, entries.exp().flatten())
    assert torch.equal(samples_of(losses, entries), truth.view(4, 6))


MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda h: h - h.mean(0),
    "batch norm": lambda h: nn.BatchNorm1d(4)(h),
    "pairs": lambda h: h @ h.t(),
    "softmax over samples": lambda h: h.softmax(0),
    "cumulated": lambda h: h.cumsum(0),
    "next sample": lambda h: h + h.roll(1, 0),
    "one pair": lambda h: torch.cat([h[:1] + h[1:2], h[1:]]),
}


@pytest.mark.parametrize("samples", [2, 7, 130])
@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED.keys())
def test_mixed_samples(mix: Callable[[Tensor], Tensor], samples: int) -> None:
    h = nn.Linear(3, 4)(torch.randn(samples, 3))
    losses = mix(h).sin().exp().sum(1)
    assert found_at(losses, h) == [Unclear(mixes=True)]


def test_above_what_mixes_samples_are_apart() -> None:
    h = nn.Linear(3, 4)(torch.randn(7, 3))
    centred = h - h.mean(0)
    z = nn.Linear(4, 4)(centred.sin())
    losses = z.exp().sum(1)
    apart, mixed = found_at(losses, centred, h)
    assert isinstance(apart, Owner)
    assert torch.equal(apart.ids.expand(7, 4), torch.arange(7).view(-1, 1).expand(-1, 4))
    assert mixed == Unclear(mixes=True)


def test_zero_proves_nothing() -> None:
    h = nn.Linear(3, 4)(torch.randn(7, 3))
    assert found_at(h.exp().sum(1) * 0, h) == [Unclear(mixes=False)]
    aside = nn.Linear(3, 4)(torch.randn(7, 3))
    assert found_at(h.exp().sum(1), aside) == [None]  # no gradient arrives there at all


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_one_sample_that_cannot_be_read(bad: float) -> None:
    h = nn.Linear(3, 4)(torch.randn(7, 3))
    factor = torch.ones(7).index_fill(0, torch.tensor(2), bad)
    ids = samples_of(h.exp().sum(1) * factor, h)
    known = torch.arange(7) != 2
    assert torch.equal(ids[known], torch.arange(7).view(-1, 1).expand(-1, 4)[known])
    assert set(ids[2].tolist()) <= {2, -1}


def test_dead_units_do_not_hide_a_sample() -> None:
    h = nn.Linear(3, 40)(torch.randn(7, 3))
    ids = samples_of(h.relu().square().sum(1), h)
    truth = torch.arange(7).view(-1, 1).expand(-1, 40)
    assert bool(((ids == truth) | (ids < 0)).all())


def test_nothing_is_left_behind() -> None:
    """The graph is kept, .grad is not touched, and no random number is drawn."""
    layer = nn.Linear(3, 4)
    h = nn.functional.dropout(layer(torch.randn(7, 3)), 0.5)
    losses = h.exp().sum(1)
    state = torch.get_rng_state()
    found_at(losses, h)
    assert torch.equal(state, torch.get_rng_state())
    assert layer.weight.grad is None
    losses.sum().backward()
