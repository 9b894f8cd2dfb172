"""The papers' gradient surgery in a few lines each: a backward for every domain, loops over pairs;
no part of fastdg."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bases import Wrap, seeded
from definitions import Batch, Make, parts
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import fastdg

Rows = list[list[Tensor]]  # of each domain that has samples: the gradient of each parameter
Rule = Callable[[Rows], list[Tensor]]


def rows_of(model: nn.Module, batch: Batch) -> Rows:
    """One forward and one backward for each domain, in the order of their ids."""
    parameters = list(model.parameters())
    return [
        list(
            torch.autograd.grad(
                F.cross_entropy(model(x), y), parameters, allow_unused=True, materialize_grads=True
            )
        )
        for _, x, y in parts(batch)
    ]


def step(rule: Rule, model: nn.Module, base: Optimizer, batch: Batch) -> None:
    for p, grad in zip(model.parameters(), rule(rows_of(model, batch)), strict=True):
        p.grad = grad
    base.step()


def agree(gs: Sequence[Tensor]) -> Tensor:
    return sum(g.sign() for g in gs).abs() == len(gs)  # type: ignore[union-attr]


def agr_sum(rows: Rows, reduction: str = "mean") -> list[Tensor]:
    scale = len(rows) if reduction == "mean" else 1
    return [torch.where(agree(gs), sum(gs) / scale, 0.0) for gs in zip(*rows, strict=True)]


def agr_rand(rows: Rows, generator: torch.Generator, reduction: str = "mean") -> list[Tensor]:
    agreed = agr_sum(rows, reduction)
    masks = [agree(gs) for gs in zip(*rows, strict=True)]
    values = torch.cat([g[m].abs() for g, m in zip(agreed, masks, strict=True)])
    sigma = values.mean() if len(values) else 0.0
    noise = [torch.randn(g.shape, generator=generator, dtype=g.dtype) * sigma for g in agreed]
    return [torch.where(m, g, z) for m, g, z in zip(masks, agreed, noise, strict=True)]


def pcgrad(
    rows: Rows, generator: torch.Generator, reduction: str = "mean", shared_order: bool = False
) -> list[Tensor]:
    domains = len(rows)
    if shared_order:
        orders = [torch.randperm(domains, generator=generator).tolist()] * domains
    else:
        keys = torch.rand((domains, domains), generator=generator, dtype=torch.float64)
        orders = keys.argsort(1).tolist()
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    total = torch.zeros_like(flat[0])
    for i, order in enumerate(orders):
        mine = flat[i].clone()
        for j in order:
            product = float(mine @ flat[j])
            if j != i and product < 0:
                mine -= product / float(flat[j] @ flat[j]) * flat[j]
        total += mine
    return unflat(total / domains if reduction == "mean" else total, rows[0])


def gram_rule(rows: Rows, weighting: Callable[[Tensor], Tensor]) -> list[Tensor]:
    if len(rows) == 1:
        return rows[0]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return unflat(weighting(flat @ flat.t()) @ flat, rows[0])


def and_mask(rows: Rows, threshold: float) -> list[Tensor]:
    out = []
    for gs in zip(*rows, strict=True):
        g = torch.stack(gs)
        mask = (g.sign().mean(0).abs() >= threshold).to(g.dtype)
        out.append(mask * g.mean(0) / (1e-10 + mask.mean()))
    return out


def sand_mask(rows: Rows, threshold: float, steepness: float) -> list[Tensor]:
    out = []
    for gs in zip(*rows, strict=True):
        g = torch.stack(gs)
        mask = torch.tanh(steepness / g.var(0) * (g.sign().mean(0).abs() - threshold)).clamp(min=0)
        mask[mask.isnan()] = 1e-17
        out.append(mask * g.mean(0) / (1e-10 + mask.mean()))
    return out


def unflat(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = flat.split([g.numel() for g in like])
    return [piece.view(g.shape) for piece, g in zip(pieces, like, strict=True)]


def inverse_norms(gram: Tensor) -> Tensor:
    """Some weighting of the Gram matrix: every gradient to the same length."""
    return 1 / (gram.diagonal().sqrt() * len(gram) + 1e-3)


Case = tuple[Wrap, Callable[[], Rule]]


def case(cls: Wrap, rule: Callable[..., list[Tensor]], **settings: Any) -> Case:
    """A wrapper and what it shall do; each time anew, for what they draw."""
    return (
        lambda base, **more: cls(base, **{**settings, **more}),
        lambda: lambda rows: rule(rows, **settings),
    )


def drawing(cls: Wrap, rule: Callable[..., list[Tensor]], **settings: Any) -> Case:
    def make_rule() -> Rule:
        generator = seeded()
        return lambda rows: rule(rows, generator=generator, **settings)

    return (
        lambda base, **more: cls(base, **{"generator": seeded(), **settings, **more}),
        make_rule,
    )


CASES: dict[str, Case] = {
    "AgrSum": case(fastdg.AgrSum, agr_sum),
    "AgrSum-sum": case(fastdg.AgrSum, agr_sum, reduction="sum"),
    "AgrRand": drawing(fastdg.AgrRand, agr_rand),
    "AgrRand-sum": drawing(fastdg.AgrRand, agr_rand, reduction="sum"),
    "PCGrad": drawing(fastdg.PCGrad, pcgrad),
    "PCGrad-shared": drawing(fastdg.PCGrad, pcgrad, shared_order=True, reduction="sum"),
    "GramSurgery": case(fastdg.GramSurgery, gram_rule, weighting=inverse_norms),
    "ANDMask": case(fastdg.ANDMask, and_mask, threshold=1.0),
    "ANDMask-0.5": case(fastdg.ANDMask, and_mask, threshold=0.5),
    "SANDMask": case(fastdg.SANDMask, sand_mask, threshold=0.4, steepness=0.01),
}
DRAWING = ("AgrRand", "AgrRand-sum", "PCGrad", "PCGrad-shared")


def wrapped(name: str, model: nn.Module, make: Make, /, **more: Any) -> Any:
    return CASES[name][0](make(model), **more)


class Given(nn.Module):
    """Its gradients are its inputs, spread over two parameters."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(n, 1, bias=False) for n in (1, places - 1))
        for p in self.parameters():
            nn.init.ones_(p)

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x[:, :1]) + self.two(x[:, 1:]))[:, 0]


def surgery(cls: Any, g: Tensor, domains: Tensor | None = None, **settings: Any) -> Any:
    """The gradient that ``cls`` makes of ``g [D, places]``, and the wrapper."""
    model = Given(g.shape[1]).double()
    opt = cls(SGD(model.parameters(), lr=0.1), **settings)
    opt.backward(model(g.double()), torch.arange(len(g)) if domains is None else domains)
    return torch.cat([p.grad.flatten() for p in model.parameters()]), opt


entries = st.sampled_from([-2.0, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0])


@st.composite
def tables(draw: Any, least: int = 1, most: int = 6) -> Tensor:
    domains, places = draw(st.integers(least, most)), draw(st.integers(2, 7))
    row = st.lists(entries, min_size=places, max_size=places)
    return torch.tensor(draw(st.lists(row, min_size=domains, max_size=domains))).double()


def split(g: Tensor) -> list[list[Tensor]]:
    return [[row[:1].view(1, 1), row[1:].view(1, -1)] for row in g.double()]
