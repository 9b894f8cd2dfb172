"""PACS at 32x32, each domain left out in turn, from a small pre-trained network: does staying near
to it help, and how much do Fishr, surgery and averaging add?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from ... import MIRO, SWAD, AgrSum, DomainOptimizer, Fishr
from ...models.resnet20 import ResNet20
from ..data.fingerprint import of_files
from ..data.pacs import CLASSES, DOMAINS, check, fingerprint, read
from .training import Part, domain_ids, split
from .units import Told, check_names, run_units, silent

BATCH = 16  # of each training domain
LR = 1e-3
STEPS = 100
SECONDS = 0.5  # of a step on one core, about
EVALUATIONS = 10
HELD = 100  # images of each training domain's 20 % that are looked at
ANNEAL = 0.3  # share of the steps before Fishr's penalty has its weight, as DomainBed's
# Fishr's of 1, 10 and 100 and MIRO's of 0.01, 0.1 and 1 with the best accuracy on the training
# domains' held-out parts (sketch left out, seed 100, twice the batch)
FISHR_WEIGHT = 1.0
MIRO_WEIGHT = 0.1
LAYERS = ("bn1", "layer1", "layer2", "layer3")


def _miro(base: Optimizer, model: nn.Module) -> MIRO:
    return MIRO(base, model, layers=LAYERS, weight=MIRO_WEIGHT)


def _fishr(base: Optimizer, steps: int) -> Fishr:
    return Fishr(
        base, penalty_weight=FISHR_WEIGHT, anneal_steps=round(ANNEAL * steps), num_domains=3
    )


Wrap = Callable[[Optimizer, nn.Module, int], Optimizer]  # and how many steps there will be
ALGORITHMS: dict[str, tuple[str, Wrap]] = {
    "erm": ("ERM", lambda base, model, steps: base),
    "miro": ("MIRO", lambda base, model, steps: _miro(base, model)),
    "fishr": ("Fishr", lambda base, model, steps: _fishr(base, steps)),
    "miro+fishr": ("MIRO + Fishr", lambda base, model, steps: _fishr(_miro(base, model), steps)),
    "agr-sum": ("Agr-Sum", lambda base, model, steps: AgrSum(base, num_domains=3)),
    "swad": ("SWAD", lambda base, model, steps: SWAD(base, model)),
    "miro+swad": ("MIRO + SWAD", lambda base, model, steps: SWAD(_miro(base, model), model)),
}
DEFAULT = tuple(ALGORITHMS)[:-1]


@dataclass(frozen=True)
class Plan:
    """The plan of a study; ``data`` holds ``pacs/`` and ``weights/``."""

    data: Path
    algorithms: tuple[str, ...] = DEFAULT
    seeds: int = 3
    steps: int = STEPS

    def __post_init__(self) -> None:
        check_names("algorithms", self.algorithms, tuple(ALGORITHMS))
        if self.seeds < 1:
            raise ValueError(f"seeds: expected >= 1, got {self.seeds}. Pass a larger number.")
        if self.steps < EVALUATIONS:
            raise ValueError(
                f"steps: expected >= {EVALUATIONS}, got {self.steps}. Pass a larger number."
            )
        ResNet20(len(CLASSES)).load_published(self.weights())
        check(self.data / "pacs")

    def seconds(self) -> float:
        """Return how long all runs take one after the other, about."""
        return SECONDS * self.steps * len(self.algorithms) * self.seeds * len(DOMAINS)

    def weights(self) -> Path:
        """Return the pre-trained network's file."""
        found = sorted((self.data / "weights").glob("resnet20*"))
        if not found:
            raise ValueError(
                f"data: there are no weights in {self.data / 'weights'}. Put resnet20-12fca82f.th "
                "of github.com/akamaster/pytorch_resnet_cifar10 there, beside "
                f"{self.data / 'pacs'}/<domain>/<class>/<image>."
            )
        return found[0]

    def settings(self) -> dict[str, Any]:
        """Return the settings that results depend on."""
        return {
            "steps": self.steps,
            "batch": BATCH,
            "lr": LR,
            "evaluations": EVALUATIONS,
            "held": HELD,
            "anneal": ANNEAL,
            "fishr_weight": FISHR_WEIGHT,
            "miro_weight": MIRO_WEIGHT,
            "layers": list(LAYERS),
        }


def run(
    plan: Plan, path: Path, fresh: bool = False, progress: Told = silent, workers: int = 1
) -> dict[str, Any]:
    """Run the units that ``path`` does not hold yet; see `units.run_units`. The runs' keys are
    ``domain/seed/algorithm``, and ``plan`` holds the algorithms and the number of seeds."""
    units = {
        f"{DOMAINS[left_out]}/{seed}/{name}": partial(train, plan, name, left_out, seed)
        for seed in range(plan.seeds)
        for left_out in range(len(DOMAINS))
        for name in plan.algorithms
    }
    asked = {"algorithms": plan.algorithms, "seeds": plan.seeds}
    data = {"pacs": fingerprint(plan.data / "pacs"), "weights": of_files([plan.weights()])}
    results = run_units(units, plan.settings(), path, fresh, progress, workers, data=data)
    return results | {"plan": asked}


def train(plan: Plan, algorithm: str, left_out: int, seed: int) -> dict[str, Any]:
    """Train on all domains but one. Deterministic in its arguments, times aside.

    Split and selection are as in `training.train`: 80:20 of each training domain, and the
    checkpoint with the best mean accuracy on (`HELD` images of) the 20 % parts. SWAD's averaged
    model is evaluated.

    Returns:
        ``chosen`` and ``last``: accuracy (per cent) on the whole domain left out, of the chosen
        checkpoint and after the last step; ``chosen_step``; ``step_seconds``, the median of the
        steps with the full penalty; and ``curve``, at each evaluation ``step``, ``loss`` of the
        last batch, and ``validation`` accuracy.
    """
    task = read(plan.data / "pacs")
    generator = torch.Generator().manual_seed(1000 * seed + left_out)
    training = [d for d in range(len(task.domains)) if d != left_out]
    fit, held = split(task, training, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet20(task.classes).train()
    model.load_published(plan.weights())
    opt = ALGORITHMS[algorithm][1](Adam(model.parameters(), lr=LR), model, plan.steps)
    domains = domain_ids(fit, BATCH)
    held = [(x[:HELD], y[:HELD]) for x, y in held]
    curve: list[dict[str, Any]] = []
    seconds: list[float] = []
    for count in range(1, plan.steps + 1):
        rows = [torch.randint(len(y), (BATCH,), generator=generator) for _, y in fit]
        parts = [(x[r], y[r]) for (x, y), r in zip(fit, rows, strict=True)]
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        began = time.perf_counter()
        loss = _step(model, opt, x, y, domains)
        if count > ANNEAL * plan.steps:
            seconds.append(time.perf_counter() - began)
        if count * EVALUATIONS % plan.steps >= EVALUATIONS:
            continue
        averaged: AbstractContextManager[object] = nullcontext()
        if isinstance(opt, SWAD):
            opt.evaluate(_evaluated(model, held)[1])
            averaged = opt.applied()
        with averaged:
            validation, _ = _evaluated(model, held)
            last = {key: value.clone() for key, value in model.state_dict().items()}
        if all(validation > point["validation"] for point in curve):
            chosen, step = last, count
        curve.append({"step": count, "loss": loss, "validation": validation})

    def tested(state: dict[str, Tensor]) -> float:
        model.load_state_dict(state)
        return _evaluated(model, [(task.images[left_out], task.labels[left_out])])[0]

    accuracy = tested(chosen)
    return {
        "chosen": accuracy,
        "last": accuracy if chosen is last else tested(last),
        "chosen_step": step,
        "step_seconds": statistics.median(seconds),
        "curve": curve,
    }


def _step(model: nn.Module, opt: Optimizer, x: Tensor, y: Tensor, domains: Tensor) -> float:
    losses = F.cross_entropy(model(x), y, reduction="none")
    opt.zero_grad()
    if isinstance(opt.base if isinstance(opt, SWAD) else opt, DomainOptimizer):
        opt.backward(losses, domains)  # type: ignore[attr-defined]
    else:
        losses.mean().backward()
    opt.step()
    return float(losses.detach().mean())


@torch.no_grad()
def _evaluated(model: nn.Module, parts: Sequence[Part]) -> tuple[float, float]:
    """Accuracy in per cent, and loss; each the mean of the parts' own."""
    right, loss = [], []
    for x, y in parts:
        logits = torch.cat(
            [model(rows.contiguous(memory_format=torch.channels_last)) for rows in x.split(50)]
        )
        right.append(100 * float((logits.argmax(1) == y).float().mean()))
        loss.append(float(F.cross_entropy(logits, y)))
    return statistics.fmean(right), statistics.fmean(loss)
