"""PACS: the accuracy of every algorithm on each domain left out."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from ...figure_style import COLOURS, PAGE, STYLE, save
from ..data.pacs import DOMAINS
from ..experiments.pacs import ALGORITHMS
from .summary import Estimate, difference, mean_and_error, ordered

MEAN = "mean"


def accuracies(results: dict[str, Any], algorithm: str, key: str) -> dict[str, list[float]]:
    """Domain left out -> accuracy (per cent) of each seed; and the mean over the domains.

    Args:
        results: of `experiments.pacs.run`.
        key: ``chosen`` or ``last``.
    """
    seeds = range(results["plan"]["seeds"])
    runs = results["runs"]
    found = {d: [runs[f"{d}/{seed}/{algorithm}"][key] for seed in seeds] for d in DOMAINS}
    return {**found, MEAN: [statistics.fmean(of) for of in zip(*found.values(), strict=True)]}


def gain(results: dict[str, Any], algorithm: str, key: str) -> tuple[Estimate, bool] | None:
    """Mean over seeds of the difference to plain training with the same seed, over all domains,
    and whether it is clear; None without plain training or several seeds."""
    if "erm" not in results["plan"]["algorithms"] or results["plan"]["seeds"] < 2:
        return None
    own, plain = (accuracies(results, name, key)[MEAN] for name in (algorithm, "erm"))
    return difference(own, plain)


def pacs_figure(results: dict[str, Any], path: Path) -> None:
    """A group of points a domain, one with its standard error for each algorithm."""
    names = ordered(results["plan"]["algorithms"])
    with rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 3.2), layout="constrained")
        axes = figure.subplots()
        for k, name in enumerate(names):
            values = accuracies(results, name, "chosen")
            for at, (group, of) in enumerate(values.items()):
                mean, error = mean_and_error(of)
                x = at + (k - (len(names) - 1) / 2) * 0.11
                axes.errorbar(
                    x,
                    mean,
                    0 if error != error else error,
                    fmt="D" if group == MEAN else "o",
                    ms=4,
                    lw=1,
                    capsize=2,
                    color=COLOURS[name],
                    label=ALGORITHMS[name][0] if at == 0 else None,
                )
                axes.plot([x] * len(of), of, ".", ms=2.5, color=COLOURS[name], alpha=0.5)
        axes.set_xticks(range(len(DOMAINS) + 1), [*(d.replace("_", " ") for d in DOMAINS), MEAN])
        axes.set_ylabel("accuracy (%) on the domain left out")
        seeds = results["plan"]["seeds"]
        axes.set_title(f"PACS at 32×32, mean ± standard error of {seeds} seeds (small: each)")
        figure.legend(loc="outside upper right", ncols=len(names))
        save(figure, path)
