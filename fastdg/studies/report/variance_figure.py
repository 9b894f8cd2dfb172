"""The domains' gradient variances over training, and how far they are apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ...figure_style import COLOURS, PAGE, STYLE, save
from ..data.digits import TASKS
from ..experiments.settings import ALGORITHMS, SETTINGS
from .summary import Estimate, mean_and_error, ordered

MOST = 4  # algorithms whose curves can be told apart
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (2, 2)), (0, (1, 2))]  # so that none covers another


def variance_figure(results: dict[str, Any], path: Path) -> None:
    """A row a task: the gradient variance of each training domain, and the distance of these.

    Of plain training and of Fishr, which is about them; without Fishr, of the first `MOST`. Means
    over seeds.
    """
    plan = results["plan"]
    names = ordered(plan["algorithms"])
    about = [name for name in names if name == "erm" or name.startswith("fishr")]
    drawn = about if about[1:] else names[:MOST]
    with rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 2.3 * len(plan["tasks"]) + 0.5), layout="constrained")
        grid = figure.subplots(len(plan["tasks"]), 2, squeeze=False)
        for line, task in zip(grid, plan["tasks"], strict=True):
            _variances(line[0], results, task, drawn)
            _distances(line[1], results, task, drawn)
        handles, labels = grid[0][1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        save(figure, path)


def curves_of(results: dict[str, Any], task: str, algorithm: str, left_out: int) -> Any:
    """Return the curve of each seed."""
    return [
        results["runs"][f"{task}/{left_out}/{seed}/{algorithm}"]["curve"]
        for seed in range(results["plan"]["seeds"])
    ]


def _band(values: list[float]) -> Estimate:
    mean, error = mean_and_error(values)
    return mean, 0.0 if math.isnan(error) else error


def _variances(axes: Axes, results: dict[str, Any], task: str, drawn: Sequence[str]) -> None:
    """If several domains are left out in turn, with the first out."""
    shape = TASKS[task](0)
    left_out = shape.tested[0]
    for algorithm, dashes in zip(drawn, cycle(DASHES), strict=False):
        curves = curves_of(results, task, algorithm, left_out)
        steps = [point["step"] for point in curves[0]]
        for d in range(len(shape.domains) - 1):
            values = [
                statistics.fmean(curve[i]["variance"][d] for curve in curves)
                for i in range(len(steps))
            ]
            axes.plot(steps, values, color=COLOURS[algorithm], lw=1.1, ls=dashes)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("variance of each domain")
    title = f"{shape.name}: gradient variance of the head"
    if len(shape.tested) > 1:
        title += f"\n({shape.domains[left_out]} left out)"
    axes.set_title(title)
    _steps(axes, results, task)


def _distances(axes: Axes, results: dict[str, Any], task: str, drawn: Sequence[str]) -> None:
    """Mean and standard error over seeds of the mean over domains left out."""
    tested = TASKS[task](0).tested
    for algorithm, dashes in zip(drawn, cycle(DASHES), strict=False):
        curves = [curves_of(results, task, algorithm, d) for d in tested]
        steps = [point["step"] for point in curves[0][0]]
        band = [
            _band(
                [statistics.fmean(c[i]["distance"] for c in of) for of in zip(*curves, strict=True)]
            )
            for i in range(len(steps))
        ]
        colour = COLOURS[algorithm]
        means = [mean for mean, _ in band]
        axes.plot(steps, means, color=colour, ls=dashes, label=ALGORITHMS[algorithm].title)
        low = [mean - error for mean, error in band]
        high = [mean + error for mean, error in band]
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("relative to their mean")
    axes.set_title("distance between the domains' variances")
    _steps(axes, results, task)


def _steps(axes: Axes, results: dict[str, Any], task: str) -> None:
    anneal = SETTINGS[task].anneal_steps(results["settings"][task]["steps"])
    axes.axvline(anneal, color="black", lw=0.7, ls=":")
    axes.set_xlabel("step (dotted: full penalty)")
