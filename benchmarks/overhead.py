"""What the wrapper itself costs: the walk of the graph, bookkeeping, and no statistic.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

``eager``: a wrapper whose algorithm is empty takes a training step on M linear layers that are so
small that arithmetic takes no time: the graph is walked, and every layer is met by the backward and
handed over in factors, of which nothing is computed. From that are taken away the same forward, a
backward that computes as much (the gradients at the layers' outputs, none of a weight) and the
optimizer's step. A line through several M gives the price of a step and of a module.

``compiled``: the same for a step in one graph (`fastdg.compiled`) that computes nothing, from which
the optimizer's step is taken away.

``fishr``: a whole step of Fishr on all layers before its anneal, from which a plain step is taken
away, with layers of 16 x 16. ``before`` and ``after``: the same of Fishr on the head, before and
after its anneal, with three such layers and ReLUs; here also the ratio of the two steps.

Times are of the processor, in one thread.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import environment, told
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg.core.batch import Batch
from fastdg.core.optimizer import DomainOptimizer
from fastdg.factors import PerSampleGrad

Run = Callable[[], None]
MODULES = (1, 10, 50, 100)
SAMPLES, WIDTH = 6, 4  # of layers in which nothing is computed
FISHR = 32, 16
LAYERS = 3  # of the small MLP


class Nothing(DomainOptimizer):
    """Asks for every parameter's per-sample gradients, and looks at none."""

    prefix = "nothing"

    def _gradient(self, staged: Sequence[Batch]) -> Tensor:
        (batch,) = staged

        def use(name: str, factor: PerSampleGrad) -> None:
            pass

        batch.tracked.collect(use)
        return batch.losses.detach()


def problem(
    modules: int, samples: int = SAMPLES, width: int = WIDTH, between: Sequence[nn.Module] = ()
) -> tuple[nn.Module, torch.optim.Optimizer, list[Tensor]]:
    """M layers, with others ``between``, their optimizer, and a batch: images, labels, domains."""
    torch.manual_seed(0)
    layers = [layer for _ in range(modules) for layer in (*between, nn.Linear(width, width))]
    model = nn.Sequential(*layers[len(between) :])
    rows = torch.arange(samples)
    batch = [torch.randn(samples, width), rows % width, rows % 3]
    return model, torch.optim.SGD(model.parameters(), lr=0.0, foreach=True), batch


def eager(modules: int) -> tuple[Run, Run]:
    """A step with the empty wrapper, and what it does of necessity."""
    model, base, (x, y, domains) = problem(modules)
    opt = Nothing(base, num_domains=3)

    def wrapped() -> None:
        losses = F.cross_entropy(model(x), y, reduction="none")
        opt.backward(losses, domains)
        opt.step()

    model2, base2, _ = problem(modules)

    def plain() -> None:
        out = model2[0](x)
        losses = F.cross_entropy(model2[1:](out), y, reduction="none")
        torch.autograd.grad(losses, out, torch.ones_like(losses))
        base2.step()

    return wrapped, plain


def compiled(modules: int) -> tuple[Run, Run]:
    """A step of Agr-Sum in one graph that gives what it once gave, and the optimizer's step."""
    model, base, (x, y, domains) = problem(modules)
    opt = fastdg.AgrSum(base, num_domains=3)
    backward = fastdg.compiled(
        opt, lambda x, y: F.cross_entropy(model(x), y, reduction="none"), backend="aot_eager"
    )

    def wrapped() -> None:
        opt.zero_grad()
        backward(x, y, domains=domains)
        opt.step()

    for _ in range(3):
        wrapped()
    (graph,) = backward.graphs.values()
    with torch.no_grad():
        found = graph.run(x, y, domains)
    graph.run = lambda *tensors: found  # what it computes is not what is measured

    return wrapped, base.step


def fishr(
    modules: int, params: str = "all", anneal: int = 1 << 40, between: Sequence[nn.Module] = ()
) -> tuple[Run, Run]:
    """A step of Fishr, on all layers and before its anneal by default, and a plain one."""
    model, base, (x, y, domains) = problem(modules, *FISHR, between)
    opt = fastdg.Fishr(base, params=params, anneal_steps=anneal, num_domains=3)

    def wrapped() -> None:
        opt.zero_grad()
        opt.backward(F.cross_entropy(model(x), y, reduction="none"), domains)
        opt.step()

    model2, base2, _ = problem(modules, *FISHR, between)

    def plain() -> None:
        base2.zero_grad()
        F.cross_entropy(model2(x), y).backward()
        base2.step()

    return wrapped, plain


def before(modules: int) -> tuple[Run, Run]:
    """A step of Fishr on the head of a small MLP before its anneal, and a plain one."""
    return fishr(modules, "head", between=[nn.ReLU()])


def after(modules: int) -> tuple[Run, Run]:
    """The same with its penalty."""
    return fishr(modules, "head", 0, [nn.ReLU()])


def microseconds(run: Run, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls * 1e6


def measure(make: Callable[[int], tuple[Run, Run]], rounds: int = 61) -> dict[str, Any]:
    """For every M what is added, and the line through that."""
    rows = {modules: added(make(modules), modules, rounds) for modules in MODULES}
    slope, intercept = statistics.linear_regression(
        *zip(*((m, row["overhead"]) for m, row in rows.items()), strict=True)
    )
    return {
        "microseconds": rows,
        "per_step": round(intercept, 1),
        "per_module": round(slope, 2),
    }


def added(runs: tuple[Run, Run], modules: int, rounds: int = 61) -> dict[str, float]:
    """A plain step, what the wrapper adds to it, and the ratio of the two steps.

    The machine's speed changes for seconds at a time, so that what counts is the median of the
    ratios of turns that follow each other."""
    gc.collect()
    gc.disable()
    try:
        for run in runs:  # checks of the first steps are over then
            microseconds(run, 12)
        calls = max(1, 60 // modules)
        pairs = [[microseconds(run, calls) for run in runs] for _ in range(rounds)]
    finally:
        gc.enable()
    ratio = statistics.median(o / p for o, p in pairs)
    plain = statistics.median(p for _, p in pairs)
    each = {"plain": plain, "overhead": (ratio - 1) * plain}
    return {name: round(value, 1) for name, value in each.items()} | {"ratio": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("eager", "compiled", "fishr", "before", "after"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"eager": eager, "compiled": compiled, "fishr": fishr}
    found = environment("python " + " ".join(sys.argv))
    for name, make in ways.items():
        if arguments.only in (None, name):
            found[name] = measure(make)
    for name, make in {"before": before, "after": after}.items():
        if arguments.only in (None, name):
            found[name] = added(make(LAYERS), LAYERS)
    told(found, arguments.out)


if __name__ == "__main__":
    main()
