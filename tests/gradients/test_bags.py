"""Bags of words: the rule of EmbeddingBag equals that of Embedding, whose rows are added up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOMAINS, NUM_DOMAINS, assert_close, scalar_of
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg.gradients import engine

N, ROWS, WIDTH = len(DOMAINS), 5, 4
LENGTHS = torch.tensor([3, 0, 1, 2, 2, 3, 1, 4])[:N]  # words of each bag
WORDS = torch.tensor([0, 3, 3, 2, 1, 1, 4, 0, 0, 2, 1, 3, 2, 2, 0, 2])[: int(LENGTHS.sum())]
OFFSETS = LENGTHS.cumsum(0) - LENGTHS
SHARES = torch.linspace(-1, 2, len(WORDS))
ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(0))
Bags = Callable[[Tensor], Tensor]


def added(table: Tensor, mode: str, weights: Tensor | None = None, padding: int = -1) -> Tensor:
    """Bags of `WORDS` by operations that autograd differentiates."""
    bag = torch.arange(N).repeat_interleave(LENGTHS)
    rows = F.embedding(WORDS, table) * (padding != WORDS).unsqueeze(1)
    rows = rows if weights is None else rows * weights.unsqueeze(1)
    total = torch.zeros(N, WIDTH, dtype=table.dtype).index_add(0, bag, rows)
    if mode == "sum":
        return total
    number = torch.zeros(N).index_add(0, bag, (padding != WORDS).to(torch.get_default_dtype()))
    return total / number.clamp(min=1).unsqueeze(1).to(table.dtype)


def weighted(table: Tensor) -> Tensor:
    shares = SHARES.to(table.dtype)
    return F.embedding_bag(WORDS, table, OFFSETS, mode="sum", per_sample_weights=shares)


def ended(table: Tensor) -> Tensor:
    ends = torch.cat([OFFSETS, torch.tensor([len(WORDS)])])
    return F.embedding_bag(WORDS, table, ends, mode="sum", include_last_offset=True)


SQUARE = (torch.arange(N * 3) * 7 % ROWS).view(N, 3)
CASES: dict[str, tuple[Bags, Bags]] = {
    "mean": (lambda w: F.embedding_bag(WORDS, w, OFFSETS), lambda w: added(w, "mean")),
    "sum": (lambda w: F.embedding_bag(WORDS, w, OFFSETS, mode="sum"), lambda w: added(w, "sum")),
    "weights": (weighted, lambda w: added(w, "sum", SHARES.to(w.dtype))),
    "padding": (
        lambda w: F.embedding_bag(WORDS, w, OFFSETS, padding_idx=1),
        lambda w: added(w, "mean", padding=1),
    ),
    "last offset": (ended, lambda w: added(w, "sum")),
    "int32": (lambda w: F.embedding_bag(WORDS.int(), w, OFFSETS.int()), lambda w: added(w, "mean")),
    "one length": (lambda w: F.embedding_bag(SQUARE, w), lambda w: F.embedding(SQUARE, w).mean(1)),
    "any order": (
        lambda w: F.embedding_bag(WORDS, w, OFFSETS)[ORDER],
        lambda w: added(w, "mean")[ORDER],
    ),
    "two of a sample": (
        lambda w: F.embedding_bag(SQUARE.repeat(2, 1), w).view(2, N, WIDTH).sum(0),
        lambda w: F.embedding(SQUARE, w).mean(1) * 2,
    ),
    "twice": (
        lambda w: F.embedding_bag(WORDS, w, OFFSETS) + F.embedding(SQUARE, w).tanh().sum(1),
        lambda w: added(w, "mean") + F.embedding(SQUARE, w).tanh().sum(1),
    ),
}


class Model(nn.Module):
    def __init__(self, bags: Bags) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(ROWS, WIDTH, dtype=torch.float64))
        self.head, self.bags = nn.Linear(WIDTH, 3, dtype=torch.float64), bags

    def losses(self) -> Tensor:
        z = self.head(self.bags(self.table).sin())
        return F.cross_entropy(z, torch.arange(N) % 3, reduction="none")


def statistics(bags: Bags) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = Model(bags)
    losses = model.losses()
    options: dict[str, Any] = {"params": model, "num_domains": NUM_DOMAINS, "retain_graph": True}
    moments = fastdg.domain_moments(losses, DOMAINS, create_graph=True, **options)
    found = {f"variance {k}": x for k, x in moments.variance.items()}
    found |= {f"mean {k}": x for k, x in moments.mean.items()}
    second = torch.autograd.grad(
        scalar_of(moments.variance), list(model.parameters()), retain_graph=True
    )
    found |= {f"second {k}": x for k, x in enumerate(second)}
    means = fastdg.domain_gradients(losses, DOMAINS, **options)
    found |= {f"domains {k}": x for k, x in means.items()}
    found["norms"] = fastdg.per_sample_norms(losses, params=model, retain_graph=True)
    rows = fastdg.per_sample_gradients(losses, params=model, retain_graph=True)
    return found | {f"sample {k}": x for k, x in rows.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_same_as_rows_that_are_added(name: str) -> None:
    bags, rows = CASES[name]
    found, wanted = statistics(bags), statistics(rows)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert_close(value, wanted[key], key)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_serves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_plans", OrderedDict())
    model = Model(CASES[name][0])
    assert {row.way for row in fastdg.explain(model.losses(), model).rows} == {"rule"}


@pytest.mark.filterwarnings("ignore:params")
def test_a_bag_of_two_samples() -> None:
    """Autograd computes the statistics, and has no derivative of them: this is said in words."""
    both = torch.arange(N) // 2
    model = Model(lambda w: F.embedding_bag(WORDS, w, OFFSETS)[both])
    found = fastdg.domain_gradients(model.losses(), DOMAINS, params=model, num_domains=NUM_DOMAINS)
    model.bags = lambda w: added(w, "mean")[both]
    wanted = fastdg.domain_gradients(model.losses(), DOMAINS, params=model, num_domains=NUM_DOMAINS)
    for name, value in found.items():
        assert_close(value, wanted[name], name)
    model.bags = lambda w: F.embedding_bag(WORDS, w, OFFSETS)[both]
    with pytest.raises(RuntimeError, match=r"^create_graph: EmbeddingBag lies between"):
        fastdg.domain_moments(model.losses(), DOMAINS, params=model, create_graph=True)


def test_gradients_that_are_not_finite_stay_with_their_samples() -> None:
    """A row of padding has no gradient, whatever comes back to it."""
    table = nn.Parameter(torch.randn(ROWS, WIDTH))
    factor = torch.ones(N, 1)
    factor[2] = torch.nan
    for rows in (
        F.embedding(SQUARE, table, padding_idx=1).sum(1),
        F.embedding_bag(SQUARE, table, padding_idx=1),
    ):
        losses = (rows * factor).sum(1)
        (grads,) = fastdg.per_sample_gradients(losses, params=[table]).values()
        finite = grads.isfinite().all(2)
        assert not finite[2, SQUARE[2][SQUARE[2] != 1]].any()
        finite[2] = finite[2] | (torch.arange(ROWS) != 1)
        assert finite.all()
