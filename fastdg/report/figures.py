"""Figures, with matplotlib's file backend only."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..data.digits import TASKS
from ..experiments.demo import mean_and_error, rows
from ..experiments.training import ALGORITHMS

COLOURS = {"erm": "#8a8a8a", "fishr-head": "#0072b2", "fishr-all": "#d55e00", "fishr": "#0072b2"}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "legend.frameon": False,
}


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(temporary, dpi=180)
    temporary.replace(path)


def demo_figure(results: dict[str, Any], path: Path) -> None:
    """Accuracy by algorithm and domain, one row a task, beside the head's gradient variances in
    training."""
    tasks = results["plan"]["tasks"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.0 * len(tasks)), layout="constrained")
        grid = figure.add_gridspec(len(tasks), 2, width_ratios=[1.25, 1])
        for row, task in enumerate(tasks):
            _accuracies(figure.add_subplot(grid[row, 0]), results, task)
            _variances(figure.add_subplot(grid[row, 1]), results, task)
        _save(figure, path)


def _accuracies(axes: Axes, results: dict[str, Any], task: str) -> None:
    table, shape = rows(results, task), TASKS[task](0)
    names = [shape.domains[d] for d in shape.tested]
    groups = [*names, "mean"] if len(names) > 1 else names
    width = 0.8 / len(table)
    low = 100.0
    for k, row in enumerate(table):
        values = [row.accuracy[name] for name in names] + ([row.mean] if len(names) > 1 else [])
        at = [g + (k - (len(table) - 1) / 2) * width for g in range(len(groups))]
        errors = [0.0 if math.isnan(e) else e for _, e in values]
        axes.bar(
            at,
            [m for m, _ in values],
            width * 0.92,
            yerr=errors,
            color=COLOURS.get(row.algorithm),
            label=row.title,
            error_kw={"lw": 0.9},
            capsize=2,
        )
        low = min(low, *(m - e for (m, _), e in zip(values, errors, strict=True)))
    chance = 100 / shape.classes
    if low < chance + 20:
        axes.axhline(chance, color="black", lw=0.8, ls=":")
        axes.text(-0.48, chance + 1, "chance", fontsize=7.5)
        axes.set_ylim(0, 105)
    else:
        axes.set_ylim(max(0.0, math.floor(low / 10) * 10 - 10), 102)
    if shape.best is not None:
        axes.axhline(shape.best, color="black", lw=0.8, ls="--")
        axes.text(-0.48, shape.best + 1, "best without colour", fontsize=7.5)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("accuracy, domain left out (%)")
    seeds = results["plan"]["seeds"]
    axes.set_title(f"{shape.name}: mean ± standard error of {seeds} seeds", loc="left")
    axes.legend(ncols=len(table), fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.1))


def _variances(axes: Axes, results: dict[str, Any], task: str) -> None:
    """How far apart the training domains' gradient variances are, relative to their mean, over
    training."""
    shape = TASKS[task](0)
    for algorithm in results["plan"]["algorithms"]:
        curves = [
            [(p["step"], _spread(p["variance"])) for p in run["curve"]]
            for key, run in results["runs"].items()
            if key.startswith(f"{task}/") and key.endswith(f"/{algorithm}")
        ]
        steps = [step for step, _ in curves[0]]
        band = [mean_and_error([curve[i][1] for curve in curves]) for i in range(len(steps))]
        colour = COLOURS.get(algorithm)
        axes.plot(steps, [m for m, _ in band], color=colour, label=ALGORITHMS[algorithm].title)
        errors = [0.0 if math.isnan(e) else e for _, e in band]
        axes.fill_between(
            steps,
            [m - e for (m, _), e in zip(band, errors, strict=True)],
            [m + e for (m, _), e in zip(band, errors, strict=True)],
            color=colour,
            alpha=0.2,
            lw=0,
        )
    axes.axvline(round(0.3 * results["plan"]["steps"]), color="black", lw=0.7, ls=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step (dotted: the penalty starts)")
    axes.set_ylabel("spread of the domains'\ngradient variances")
    axes.set_title(f"{shape.name}: std / mean over domains, head", loc="left")


def _spread(values: list[float]) -> float:
    mean = statistics.fmean(values)
    return statistics.pstdev(values) / mean if mean > 0 else 0.0


def colored_mnist_figure(results: dict[str, Any], path: Path) -> None:
    """Train, test and grey accuracy over the steps, and the final ones beside the paper's."""
    from ..experiments.colored_mnist import PAPER

    with mpl.rc_context(STYLE):
        names = list(results["algorithms"])
        figure = Figure(figsize=(9.5, 3.2), layout="constrained")
        panels = figure.subplots(1, len(names) + 1)
        shades = {"train": "#8a8a8a", "test": "#d55e00", "grey": "#0072b2"}
        for axes, name in zip(panels, names, strict=False):
            for restart in results["algorithms"][name]["restarts"]:
                for key, colour in shades.items():
                    steps = [point["step"] for point in restart["curve"]]
                    axes.plot(steps, [p[key] for p in restart["curve"]], color=colour, alpha=0.8)
            axes.axvline(190, color="black", lw=0.7, ls=":")
            axes.set(ylim=(0, 100), xlabel="step", title=f"{name.upper()}", ylabel="accuracy (%)")
        axes = panels[-1]
        for k, name in enumerate(names):
            for j, (key, colour) in enumerate(shades.items()):
                ours = results["algorithms"][name]["summary"][key]
                at = k + (j - 1) * 0.26
                axes.bar(at, ours["mean"], 0.22, color=colour, label=key if k == 0 else None)
                mean, std = PAPER[name][key]
                axes.errorbar(
                    at,
                    mean,
                    std,
                    fmt="D",
                    color="black",
                    ms=3,
                    label="paper" if k + j == 0 else None,
                )
        axes.set_xticks(range(len(names)), [n.upper() for n in names])
        axes.set(ylim=(0, 100), title="final, beside the paper")
        axes.legend(fontsize=7.5, ncols=2)
        _save(figure, path)
