"""Graphs of one signature whose rows belong to other samples each time, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg

N, D = 6, 2
DOMAINS = torch.arange(N) % D
Step = Callable[[nn.Module, Tensor], Tensor]  # the losses of a model and a batch


def gate(size: float) -> Step:
    """A gate that is 0 at first hides that the mean of the batch mixes the samples."""
    return lambda m, x: head(m, m.one(x) + size * m.one(x).mean(0))


def product(order: Sequence[int]) -> Step:
    """A matrix product with a permutation, which its values show alone."""
    return lambda m, x: head(m, torch.eye(N, dtype=x.dtype)[list(order)] @ m.one(x))


def index(order: Sequence[int]) -> Step:
    return lambda m, x: head(m, m.one(x)[list(order)])


def choice(straight: Sequence[bool]) -> Step:
    """Rows of the batch, or of the batch turned round."""

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        h = m.one(x)
        return head(m, torch.where(torch.tensor(straight)[:, None], h, h.flip(0)))

    return losses


def attention(sharpness: float) -> Step:
    """Over samples: each sees itself alone where it is sharp."""

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        h = m.one(x)
        return head(m, (sharpness * h @ h.t()).softmax(1) @ h)

    return losses


def unit(threshold: float) -> Step:
    """A unit on the sum of the batch that is dead at first."""
    return lambda m, x: head(m, m.one(x) + F.relu(m.one(x).sum(0) - threshold))


def penalty(weight: float) -> Step:
    return lambda m, x: head(m, m.one(x)) + weight * m.one.weight.square().sum()


def scattered(rows: Sequence[int]) -> Step:
    def losses(m: nn.Module, x: Tensor) -> Tensor:
        h = m.one(x)
        return head(m, torch.zeros_like(h).index_add(0, torch.tensor(rows), h))

    return losses


def between(before: int) -> Step:
    """Constants before and after the samples, as many in all."""

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        rows = [torch.ones(before, 4), m.one(x)]
        return head(m, torch.cat([*rows, torch.ones(3 - before, 4)])[1 : N + 1])

    return losses


def mode(training: bool) -> Step:
    return lambda m, x: head(m, m.norm.train(training)(m.one(x)))


def head(m: nn.Module, h: Tensor) -> Tensor:
    return m.two(h.tanh()).square().sum(1)


RUNS: dict[str, list[Step]] = {
    "gate": [gate(0.0)] * 3 + [gate(1.0)] * 2 + [gate(0.0)],
    "product": [product(p) for p in ((0, 1, 2, 3, 4, 5), (1, 0, 2, 3, 5, 4), (5, 4, 3, 2, 1, 0))],
    "index": [index(p) for p in ((0, 1, 2, 3, 4, 5), (1, 0, 2, 3, 5, 4), (5, 4, 3, 2, 1, 0))],
    "choice": [choice([True] * N), choice([False] * N), choice([True, False] * 3)],
    "attention": [attention(1e6), attention(1e6), attention(1.0), attention(0.1)],
    "unit": [unit(1e3)] * 3 + [unit(-1e3)] * 2,
    "penalty": [penalty(0.0)] * 3 + [penalty(0.1)] * 2,
    "scattered": [
        scattered(p) for p in ((0, 1, 2, 3, 4, 5), (0, 0, 1, 1, 2, 2), (5, 3, 1, 0, 2, 4))
    ],
    "between": [between(k) for k in (1, 0, 2, 3)],
    "mode": [mode(t) for t in (False, True, False, True, True)],
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)


@pytest.mark.filterwarnings("ignore:.*take one call of autograd")
@pytest.mark.parametrize("name", RUNS)
def test_values_choose_or_mix_rows(name: str) -> None:
    torch.manual_seed(0)
    model = Model().double()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for step, losses_of in enumerate(RUNS[name]):
            losses = losses_of(model, torch.randn(N, 4))
            parameters = dict(model.named_parameters())
            expected = [
                torch.autograd.grad(
                    losses[d == DOMAINS].mean(),
                    list(parameters.values()),
                    retain_graph=True,
                    allow_unused=True,
                )
                for d in range(D)
            ]
            got = fastdg.domain_gradients(losses, DOMAINS, params=model)
            for k, (key, p) in enumerate(parameters.items()):
                rows = [torch.zeros_like(p) if row[k] is None else row[k] for row in expected]
                mine = got.get(key, torch.zeros(D, *p.shape))
                torch.testing.assert_close(mine, torch.stack(rows), msg=f"step {step}: {key}")
    finally:
        torch.set_default_dtype(before)
