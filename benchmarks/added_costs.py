"""What SAM, the Gram rules and per-sample products add to the work that they cannot do without.

    OMP_WAIT_POLICY=passive python benchmarks/added_costs.py \\
        --out benchmarks/results/added_costs.json

``sam``: a step of SAM by closure beside the same two forwards and backwards, the move to the other
weights and back, and the optimizer's step, by hand. ``gram``: a step of each Gram rule beside
PCGrad's, which has the same forward, domain gradients and Gram matrix. ``products``: inner products
of each sample's gradient with K directions beside the same forward, a backward to the layers'
outputs and the matrix products alone (K an input of a linear layer), and beside autograd's own way,
a backward a sample. All take turns; a ratio is the median of the ratios of turns that follow each
other. Optimizers do not move the weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Run, environment, summary, timed, told, turns
from head_peers import still
from models import DOMAINS, Problem, problem
from surgery_cases import ours
from torch import Tensor, nn

import fastdg

RULES = ("MGDA", "CAGrad", "UPGrad", "DualProj", "IMTLG", "AlignedMTL", "ConFIG", "NashMTL")
RULES += ("FairGrad", "GradVac")
DIRECTIONS = 3
RHO = 0.05


def sam(on: Problem) -> Run:
    opt = fastdg.SAM(still(on), rho=RHO)

    def closure() -> Tensor:
        opt.zero_grad()
        return opt.backward(on.losses(), on.domains)

    return lambda: opt.step(closure)


def two_backwards(on: Problem) -> Run:
    """SAM by hand, with torch's fused list operations."""
    parameters, base = list(on.model.parameters()), still(on)

    def run() -> None:
        base.zero_grad()
        on.losses().mean().backward()
        grads = [p.grad for p in parameters]
        with torch.no_grad():
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            kept = [p.clone() for p in parameters]
            torch._foreach_add_(parameters, torch._foreach_mul(grads, RHO / (norm + 1e-12)))
        base.zero_grad()
        on.losses().mean().backward()
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)
        base.step()

    return run


def directions(on: Problem) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    named = on.model.named_parameters()
    return {k: torch.randn(DIRECTIONS, *p.shape, generator=generator) for k, p in named}


def products(on: Problem) -> Run:
    given = directions(on)
    return lambda: fastdg.per_sample_products(
        on.losses(), given, params=on.model, retain_graph=False
    )


def products_alone(on: Problem) -> Run:
    """The matrix products of the answer, of linear layers, and no more."""
    given, layers = directions(on), dict(on.model.named_modules())
    linear = {k: m for k, m in layers.items() if isinstance(m, nn.Linear)}

    def run() -> None:
        seen: list[tuple[Tensor, Tensor, str]] = []
        handles = [
            m.register_forward_hook(lambda m, x, z, k=k: seen.append((x[0], z, k)))
            for k, m in linear.items()
        ]
        losses = on.losses()
        for handle in handles:
            handle.remove()
        deltas = torch.autograd.grad(losses.sum(), [z for _, z, _ in seen])
        with torch.no_grad():
            for (x, _, name), delta in zip(seen, deltas, strict=True):
                for weight in given[f"{name}.weight"]:
                    ((x @ weight.t()) * delta).sum(1)
                delta @ given[f"{name}.bias"].t()

    return run


def products_by_samples(on: Problem) -> Run:
    """A backward a sample, and its products."""
    parameters = list(on.model.parameters())
    given = [direction.flatten(1) for direction in directions(on).values()]

    def run() -> Tensor:
        rows = []
        for loss in on.losses().unbind():
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            rows.append(sum(d @ g.flatten() for d, g in zip(given, grads, strict=True)))
        return torch.stack(rows)  # type: ignore[arg-type]

    return run


Makers = dict[str, Callable[[Problem], Run]]
# question -> model, samples, contenders; the first is what the others are divided by
CASES: dict[str, tuple[str, int, Makers]] = {
    "sam, MLP": ("mlp", 96, {"two backwards": two_backwards, "SAM": sam}),
    "sam, MNIST_CNN": ("mnist_cnn", 96, {"two backwards": two_backwards, "SAM": sam}),
    "gram, MNIST_CNN": (
        "mnist_cnn",
        96,
        {k: ours(getattr(fastdg, k), DOMAINS, still) for k in ("PCGrad", *RULES)},
    ),
    "products, MLP": (
        "mlp",
        96,
        {
            "its products": products_alone,
            "per_sample_products": products,
            "a backward a sample": products_by_samples,
        },
    ),
}


def warm(runs: dict[str, Run]) -> float:
    """Return the seconds of all runs, called once each after the steps in which graphs are
    probed."""
    for run in runs.values():
        for _ in range(4):
            run()
    return sum(timed(run) for run in runs.values())


def measured(times: dict[str, list[float]]) -> dict[str, Any]:
    first = next(iter(times.values()))
    rows = {}
    for name, each in times.items():
        ratio = statistics.median(t / f for t, f in zip(each, first, strict=True))
        found = {k: v if k == "runs" else round(v, 6) for k, v in summary(each).items()}
        rows[name] = {
            "ratio": round(ratio, 4),
            "of_minima": round(min(each) / min(first), 4),
            **found,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each case")
    parser.add_argument("--samples", type=int, help="in place of each case's own")
    parser.add_argument("--only", choices=CASES, action="append")
    arguments = parser.parse_args()
    found = environment("python " + " ".join(sys.argv))
    found["settings"] = {
        "domains": DOMAINS,
        "directions": DIRECTIONS,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }
    found["cases"] = {}
    for case in arguments.only or CASES:
        model, samples, makers = CASES[case]
        samples = arguments.samples or samples
        runs = {name: make(problem(model, samples)) for name, make in makers.items()}
        rounds = max(5, int(arguments.seconds / warm(runs)))
        rows = measured(turns(runs, rounds))
        found["cases"][case] = {"model": model, "samples": samples, "rows": rows}
        for name, row in rows.items():
            print(
                f"{case}: {name} {1e3 * row['median']:.2f} ms, {row['ratio']:.3f}x", file=sys.stderr
            )
    told(found, arguments.out)


if __name__ == "__main__":
    main()
