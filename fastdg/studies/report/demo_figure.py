"""The demo's figure: accuracies, and the domains' gradient variances over training."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ...figure_style import COLOURS, STYLE, save
from ..data.digits import TASKS
from ..experiments.settings import ALGORITHMS, SETTINGS
from .summary import Estimate, mean_and_error, rows


def demo_figure(results: dict[str, Any], path: Path) -> None:
    """A row a task: accuracy, each training domain's gradient variance, and their distance."""
    plan = results["plan"]
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 3.0 * len(plan["tasks"]) + 0.35), layout="constrained")
        grid = figure.subplots(len(plan["tasks"]), 3, squeeze=False, width_ratios=[2.2, 1, 1])
        for line, task in zip(grid, plan["tasks"], strict=True):
            _accuracies(line[0], results, task)
            _variances(line[1], results, task)
            _distances(line[2], results, task)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        save(figure, path)


def _bar(values: list[float]) -> Estimate:
    mean, error = mean_and_error(values)
    return mean, 0.0 if math.isnan(error) else error


def _accuracies(axes: Axes, results: dict[str, Any], task: str) -> None:
    table, shape = rows(results, task), TASKS[task](0)
    several = len(shape.tested) > 1
    groups = [*shape.domains, "mean"] if several else ["chosen on\ntraining domains"]
    groups.append("mean,\nlast step" if several else "last step")
    width = 0.8 / len(table)
    for k, row in enumerate(table):
        bars = [
            *(list(row.domains.values()) if several else []),
            _bar(row.chosen),
            _bar(row.last),
        ]
        at = [group + (k - (len(table) - 1) / 2) * width for group in range(len(groups))]
        errors = [0.0 if math.isnan(error) else error for _, error in bars]
        axes.bar(
            at,
            [mean for mean, _ in bars],
            width * 0.9,
            yerr=errors,
            color=COLOURS[row.algorithm],
            label=row.title,
            error_kw={"lw": 0.8},
            capsize=2,
        )
    chance = 100 / shape.classes
    lines = [(chance, ":", "guessing")]
    if shape.best is not None:
        lines.append((shape.best, "--", "best without\ncolour"))
    for level, dashes, words in lines:
        axes.axhline(level, color="black", lw=0.7, ls=dashes, zorder=0)
        axes.annotate(
            words,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_ylim(0, 100)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("accuracy, domain left out (%)")
    seeds = results["plan"]["seeds"]
    error = f", mean ± s.e. of {seeds} seeds" if seeds > 1 else ""
    axes.set_title(f"{shape.name}{error}")


def curves_of(results: dict[str, Any], task: str, algorithm: str, left_out: int) -> Any:
    return [
        results["runs"][f"{task}/{left_out}/{seed}/{algorithm}"]["curve"]
        for seed in range(results["plan"]["seeds"])
    ]


def _variances(axes: Axes, results: dict[str, Any], task: str) -> None:
    """Of plain training and of Fishr, which is about them: the mean over seeds; if several domains
    are left out in turn, of the first."""
    shape = TASKS[task](0)
    left_out = shape.tested[0]
    compared = [a for a in results["plan"]["algorithms"] if a == "erm" or a.startswith("fishr")]
    for algorithm in compared or results["plan"]["algorithms"][:1]:
        curves = curves_of(results, task, algorithm, left_out)
        steps = [point["step"] for point in curves[0]]
        for d in range(len(shape.domains) - 1):
            values = [
                statistics.fmean(curve[i]["variance"][d] for curve in curves)
                for i in range(len(steps))
            ]
            axes.plot(steps, values, color=COLOURS[algorithm], lw=1.1, alpha=0.9)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("of each training domain")
    title = "gradient variance of the head"
    if len(shape.tested) > 1:
        title += f" ({shape.domains[left_out]} left out)"
    axes.set_title(title)
    _steps(axes, results, task)


def _distances(axes: Axes, results: dict[str, Any], task: str) -> None:
    """Mean and standard error over seeds of the mean over domains left out."""
    tested = TASKS[task](0).tested
    for algorithm in results["plan"]["algorithms"]:
        curves = [curves_of(results, task, algorithm, d) for d in tested]
        steps = [point["step"] for point in curves[0][0]]
        band = [
            _bar(
                [statistics.fmean(c[i]["distance"] for c in of) for of in zip(*curves, strict=True)]
            )
            for i in range(len(steps))
        ]
        colour = COLOURS[algorithm]
        axes.plot(
            steps, [mean for mean, _ in band], color=colour, label=ALGORITHMS[algorithm].title
        )
        low = [mean - error for mean, error in band]
        high = [mean + error for mean, error in band]
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("relative to their mean")
    axes.set_title("distance between the variances")
    _steps(axes, results, task)


def _steps(axes: Axes, results: dict[str, Any], task: str) -> None:
    anneal = SETTINGS[task].anneal_steps(results["settings"][task]["steps"])
    axes.axvline(anneal, color="black", lw=0.7, ls=":")
    axes.set_xlabel("step (dotted: full penalty)")
