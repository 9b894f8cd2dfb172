"""What the wrapper itself costs: hooks, staging, bookkeeping, and no statistic.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

A wrapper whose algorithm is empty takes a training step on M linear layers that are so small that
arithmetic takes no time: every layer is watched, staged, met by the backward and handed over in
factors, of which nothing is computed. From that are taken away the same forward, a backward that
computes as much (the gradients at the layers' outputs, none of a weight) and the optimizer's step.
A line through several M gives the price of a step and of a tracked module.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import environment
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg.optim.batch import Batch
from fastdg.optim.wrapper import DomainOptimizer
from fastdg.statistics.collect import collect
from fastdg.statistics.factors import Factor

MODULES = (1, 10, 50, 100)
SAMPLES, WIDTH = 6, 4


class Nothing(DomainOptimizer):
    """Asks for every parameter's per-sample gradients, and looks at none."""

    prefix = "nothing"

    def _gradient(self, staged: Sequence[Batch]) -> Tensor:
        (batch,) = staged
        found, owned, chosen = batch.resolved

        def use(name: str, factor: Factor) -> None:
            pass

        collect(batch.losses, found, owned, chosen.__contains__, use)
        return batch.losses.detach()


def step(modules: int, wrapped: bool) -> Callable[[], None]:
    """A training step, with the empty wrapper or with what it does of necessity."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(modules)))
    x, y = torch.randn(SAMPLES, WIDTH), torch.arange(SAMPLES) % WIDTH
    domains = torch.arange(SAMPLES) % 3
    base = torch.optim.SGD(model.parameters(), lr=0.0, foreach=True)
    if wrapped:
        opt = Nothing(base, params="all", num_domains=3, check=False)

        def run() -> None:
            losses = F.cross_entropy(model(x), y, reduction="none")
            opt.backward(losses, domains)
            opt.step()

        return run

    def plain() -> None:
        out = model[0](x)
        losses = F.cross_entropy(model[1:](out), y, reduction="none")
        torch.autograd.grad(losses, out, torch.ones_like(losses))
        base.step()

    return plain


def microseconds(run: Callable[[], None], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls * 1e6


def measure(rounds: int = 15) -> dict[str, Any]:
    """Median over ``rounds`` of turns of the difference, for every M, and the line through them."""
    rows = {}
    gc.collect()
    gc.disable()
    try:
        for modules in MODULES:
            ours, plain = step(modules, wrapped=True), step(modules, wrapped=False)
            for run in (ours, plain):
                microseconds(run, 5)
            calls = max(3, 300 // modules)
            pairs = []
            for _ in range(rounds):
                pairs.append((microseconds(ours, calls), microseconds(plain, calls)))
                gc.collect()
            each = {
                "plain": statistics.median(p for _, p in pairs),
                "wrapped": statistics.median(o for o, _ in pairs),
                "overhead": statistics.median(o - p for o, p in pairs),
            }
            rows[modules] = {name: round(value, 1) for name, value in each.items()}
    finally:
        gc.enable()
    per_step, per_module = line([(m, row["overhead"]) for m, row in rows.items()])
    return {
        "microseconds": rows,
        "per_step": round(per_step, 1),
        "per_module": round(per_module, 2),
    }


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the least squares line."""
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return intercept, slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {**environment("python " + " ".join(sys.argv)), **measure()}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    assert fastdg.backends()["reference"][0]
    main()
