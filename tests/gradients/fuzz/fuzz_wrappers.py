"""Wrappers and what each shall do, by plain autograd on the same graphs; no part of fastdg."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from definitions import iga_of
from oracle import one_by_one
from surgeries import agr_sum, and_mask, pcgrad, sand_mask
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

import fastdg

D = 3


@dataclass
class Part:
    """A micro-batch; ``logits`` and ``labels`` where the losses are their cross-entropy."""

    losses: Tensor
    domains: Tensor
    logits: Tensor | None
    labels: Tensor | None


@dataclass
class Expected:
    """A gradient of each trained parameter, and where it may be another, by rounding."""

    grads: dict[str, Tensor]
    or_else: dict[str, Tensor] = field(default_factory=dict)
    unclear: dict[str, Tensor] = field(default_factory=dict)  # entries that may


class Oracle:
    """What a wrapper shall do, with the state that it keeps.

    Args:
        choice: of the settings.
    """

    second = False  # whether it takes a second derivative
    head = None  # that losses have to have

    def __init__(self, choice: random.Random) -> None:
        self.choice = choice

    def wrap(self, base: SGD) -> Any:
        """The wrapper."""
        raise NotImplementedError

    def expected(self, opt: Any, parts: Sequence[Part], trained: dict[str, Tensor]) -> Expected:
        """The gradients of this step."""
        total = self.objective(parts, trained)
        found = torch.autograd.grad(
            total, list(trained.values()), retain_graph=True, materialize_grads=True
        )
        return Expected(dict(zip(trained, found, strict=True)))

    def objective(self, parts: Sequence[Part], trained: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def step(self) -> None:
        """State moves."""


def risks(parts: Sequence[Part]) -> dict[int, Tensor]:
    """The mean loss of each domain that has samples."""
    found = {}
    for d in range(D):
        of_one = torch.cat([part.losses[part.domains == d] for part in parts])
        if len(of_one):
            found[d] = of_one.double().mean()
    return found


def rows_of(parts: Sequence[Part], trained: dict[str, Tensor]) -> list[list[Tensor]]:
    return [
        [
            g.double()
            for g in torch.autograd.grad(
                risk, list(trained.values()), retain_graph=True, materialize_grads=True
            )
        ]
        for risk in risks(parts).values()
    ]


class ERM(Oracle):
    def wrap(self, base: SGD) -> Any:
        return fastdg.ERM(base)

    def objective(self, parts: Sequence[Part], trained: dict[str, Tensor]) -> Tensor:
        return torch.cat([part.losses for part in parts]).double().mean()


class PCGrad(Oracle):
    def wrap(self, base: SGD) -> Any:
        self.settings = {
            "reduction": self.choice.choice(["mean", "sum"]),
            "shared_order": self.choice.random() < 0.5,
        }
        return fastdg.PCGrad(base, generator=torch.Generator().manual_seed(1), **self.settings)

    def expected(self, opt: Any, parts: Sequence[Part], trained: dict[str, Tensor]) -> Expected:
        generator = torch.Generator()
        generator.set_state(opt.generator.get_state())
        made = pcgrad(rows_of(parts, trained), generator, **self.settings)
        return Expected(dict(zip(trained, made, strict=True)))


class AgrSum(Oracle):
    def wrap(self, base: SGD) -> Any:
        self.reduction = self.choice.choice(["mean", "sum"])
        return fastdg.AgrSum(base, reduction=self.reduction)

    def expected(self, opt: Any, parts: Sequence[Part], trained: dict[str, Tensor]) -> Expected:
        rows = rows_of(parts, trained)
        made = dict(zip(trained, agr_sum(rows, self.reduction), strict=True))
        scale = len(rows) if self.reduction == "mean" else 1
        masked = [torch.stack(gs).sum(0) / scale for gs in zip(*rows, strict=True)]
        other = {n: torch.where(made[n] == 0, m, 0) for n, m in zip(trained, masked, strict=True)}
        return Expected(made, other, unclear(rows, trained))


def unclear(rows: list[list[Tensor]], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where the sign of some domain's gradient is one of rounding."""
    found = {}
    for name, *gs in zip(trained, *rows, strict=True):
        g = torch.stack(gs)
        small = g.abs() < 1e-10 * g.abs().max().clamp(min=1)
        found[name] = (small & (g != 0)).any(0) if len(rows) > 1 else torch.zeros_like(g[0]).bool()
    return found


class ANDMask(Oracle):
    def wrap(self, base: SGD) -> Any:
        self.threshold = self.choice.choice([0.3, 1.0])
        return fastdg.ANDMask(base, threshold=self.threshold)

    def masked(self, rows: list[list[Tensor]]) -> list[Tensor]:
        return and_mask(rows, self.threshold)

    def expected(self, opt: Any, parts: Sequence[Part], trained: dict[str, Tensor]) -> Expected:
        rows = rows_of(parts, trained)
        made = self.masked(rows) if len(rows) > 1 else rows[0]
        # The mean of a mask is in each entry
        any_of_it = {
            name: where.any().expand_as(where) for name, where in unclear(rows, trained).items()
        }
        return Expected(dict(zip(trained, made, strict=True)), {}, any_of_it)


class SANDMask(ANDMask):
    def wrap(self, base: SGD) -> Any:
        self.threshold, self.steepness = 0.4, self.choice.choice([0.01, 10.0])
        return fastdg.SANDMask(base, threshold=self.threshold, steepness=self.steepness)

    def masked(self, rows: list[list[Tensor]]) -> list[Tensor]:
        return sand_mask(rows, self.threshold, self.steepness)


class Annealed(Oracle):
    settings: dict[str, Any]
    taken = 0

    def annealed(self, *pre: float) -> dict[str, Any]:
        self.settings = {
            "penalty_weight": self.choice.choice([0.3, 2.0]),
            "anneal_steps": self.choice.choice([0, 2]),
            "pre_anneal_weight": self.choice.choice(pre),
        }
        return self.settings

    @property
    def weight(self) -> float:
        early = self.taken < self.settings["anneal_steps"]
        return self.settings["pre_anneal_weight" if early else "penalty_weight"]

    def step(self) -> None:
        self.taken += 1


class VREx(Annealed):
    def wrap(self, base: SGD) -> Any:
        return fastdg.VREx(base, **self.annealed(0.0, 1.0))

    def objective(self, parts: Sequence[Part], trained: dict[str, Tensor]) -> Tensor:
        losses = torch.stack([*risks(parts).values()])
        return losses.mean() + self.weight * (losses - losses.mean()).square().mean()


class GroupDRO(Oracle):
    def wrap(self, base: SGD) -> Any:
        self.q, self.grown, self.eta = torch.ones(D).double() / D, None, 0.5
        return fastdg.GroupDRO(base, eta=self.eta, num_domains=D)

    def objective(self, parts: Sequence[Part], trained: dict[str, Tensor]) -> Tensor:
        found, self.grown = risks(parts), self.q.clone()
        share = self.q[list(found)].sum()
        for d, loss in found.items():
            self.grown[d] *= (self.eta * loss.detach()).exp()
        here = self.grown[list(found)]
        self.grown[list(found)] = here / here.sum() * share
        return sum(self.grown[d] / share * loss for d, loss in found.items())

    def step(self) -> None:
        self.q = self.grown


class IRM(Annealed):
    head = "cross entropy"
    second = True

    def wrap(self, base: SGD) -> Any:
        return fastdg.IRM(base, **self.annealed(0.0, 1.0))

    def objective(self, parts: Sequence[Part], trained: dict[str, Tensor]) -> Tensor:
        losses, penalties = [], []
        for d, loss in risks(parts).items():
            losses.append(loss)
            z = torch.cat([p.logits[p.domains == d] for p in parts]).double()
            y = torch.cat([p.labels[p.domains == d] for p in parts])
            scale = torch.ones((), dtype=torch.float64, requires_grad=True)
            one, two = (
                torch.autograd.grad(
                    F.cross_entropy(z[half::2] * scale, y[half::2]), scale, create_graph=True
                )[0]
                if len(y) > 1
                else scale.detach() * 0
                for half in (0, 1)
            )
            penalties.append(one * two)
        return torch.stack(losses).mean() + self.weight * torch.stack(penalties).mean()


class IGA(Oracle):
    second = True

    def wrap(self, base: SGD) -> Any:
        self.weight = self.choice.choice([0.0, 0.5])
        return fastdg.IGA(base, penalty_weight=self.weight)

    def objective(self, parts: Sequence[Part], trained: dict[str, Tensor]) -> Tensor:
        return iga_of([*risks(parts).values()], list(trained.values()), self.weight)[0]


class Fishr(Annealed):
    second = True

    def wrap(self, base: SGD) -> Any:
        self.decay = self.choice.choice([None, 0.6])
        self.reduction = self.choice.choice(["mean", "sum"])
        names = [name for group in base.param_groups for name in group["param_names"]]
        some = {"matrices.0", *self.choice.sample(names, len(names) // 2)}
        self.params = self.choice.choice(["all", "all", sorted(some)])
        self.history: dict[str, Tensor] = {}
        return fastdg.Fishr(
            base,
            params=self.params,
            ema=self.decay,
            reduction=self.reduction,
            reset_base=False,
            num_domains=D,
            **self.annealed(0.0, 0.7),
        )

    def objective(self, parts: Sequence[Part], trained: dict[str, Tensor]) -> Tensor:
        losses = torch.cat([part.losses for part in parts])
        domains = torch.cat([part.domains for part in parts])
        reached = torch.autograd.grad(
            losses.sum(), list(trained.values()), retain_graph=True, allow_unused=True
        )
        chosen = {
            name: p
            for (name, p), g in zip(trained.items(), reached, strict=True)
            if g is not None and (self.params == "all" or name in self.params)
        }
        weight, mean = self.weight, losses.double().mean()
        self.pending: dict[str, Tensor] = {}
        if not chosen:
            return mean
        present = [d for d in range(D) if bool((domains == d).any())]
        total, size = torch.zeros(()).double(), 0
        for name, g in one_by_one(losses, chosen, create_graph=weight > 0).items():
            g = g.double()
            v = {}
            for d in present:
                rows = g[domains == d]
                v[d] = (rows - rows.mean(0)).square().mean(0)
            before = self.history.get(name, torch.zeros(D, *g.shape[1:]).double())
            decay = self.decay or 0.0
            u = torch.stack([v[d] + decay / (1 - decay) * before[d] for d in present])
            total = total + (u - u.mean(0)).square().sum()
            size += v[present[0]].numel()
            after = before.clone()
            for d in present:
                after[d] = decay * before[d] + (1 - decay) * v[d].detach()
            self.pending[name] = after
        if self.reduction == "mean":
            total = total / (size * len(present))
        return mean + weight * total if weight > 0 else mean

    def step(self) -> None:
        super().step()
        self.history |= self.pending


class Fish(Oracle):
    """Batches are of one domain each."""

    alone = True

    def wrap(self, base: SGD) -> Any:
        self.meta_lr, self.steps = self.choice.choice([0.3, 1.0]), self.choice.choice([2, 3])
        return fastdg.Fish(base, meta_lr=self.meta_lr, num_domains=D, meta_steps=self.steps)

    def objective(self, parts: Sequence[Part], trained: dict[str, Tensor]) -> Tensor:
        return torch.cat([part.losses for part in parts]).double().mean()


ORACLES: dict[str, Callable[[random.Random], Oracle]] = {
    cls.__name__: cls
    for cls in (*(ERM, PCGrad, AgrSum, ANDMask, SANDMask, VREx, GroupDRO, IRM, IGA, Fishr, Fish),)
}
