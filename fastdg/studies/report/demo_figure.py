"""The demo's figure: accuracies of all algorithms, and how far the domains' variances are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ...figure_style import COLOURS, PAGE, STYLE, save
from ..data.digits import TASKS
from .summary import Row, mean_and_error, rows

SHARES = (2.2, 1)  # of the width, for the accuracies and for the distances


def demo_figure(results: dict[str, Any], path: Path) -> None:
    """A panel a task with a row an algorithm, however many: accuracy on the domains left out, and
    the distance between the domains' gradient variances. Mean and standard error over seeds."""
    tasks = results["plan"]["tasks"]
    count = len(results["plan"]["algorithms"])
    height = len(tasks) * (0.95 + 0.19 * count) + 0.45
    with rc_context(STYLE):
        figure = Figure(figsize=(PAGE, height), layout="constrained")
        grid = figure.subplots(len(tasks), 2, squeeze=False, sharey="row", width_ratios=SHARES)
        for (left, right), task in zip(grid, tasks, strict=True):
            table = rows(results, task)
            _accuracies(left, task, table)
            _distances(right, table)
        marks = [_mark("o", "after the last step"), _mark("|", "chosen on the training domains")]
        seeds = results["plan"]["seeds"]
        title = f"mean ± standard error of {seeds} seeds" if seeds > 1 else "one seed"
        figure.legend(handles=marks, title=title, loc="outside upper center", ncols=2)
        save(figure, path)


def _mark(marker: str, label: str) -> Line2D:
    return Line2D([], [], color="0.3", marker=marker, ls="", ms=5, mew=1.4, label=label)


def _dots(axes: Axes, table: Sequence[Row], values: Sequence[list[float]], marker: str) -> None:
    for at, (row, of) in enumerate(zip(table, values, strict=True)):
        mean, error = mean_and_error(of)
        axes.errorbar(
            mean,
            at,
            xerr=None if math.isnan(error) or marker == "|" else error,
            fmt=marker,
            ms=8 if marker == "|" else 5,
            mew=1.4,
            lw=1,
            color=COLOURS[row.algorithm],
        )


def _accuracies(axes: Axes, task: str, table: Sequence[Row]) -> None:
    shape = TASKS[task](0)
    _dots(axes, table, [row.chosen for row in table], "|")
    _dots(axes, table, [row.last for row in table], "o")
    lines = [(100 / shape.classes, ":", "guessing"), (shape.best, "--", "best without cue")]
    lines.append((shape.cue, "-.", "cue alone"))
    for level, dashes, words in lines:
        if level is not None:
            axes.axvline(level, color="black", lw=0.7, ls=dashes, zorder=0)
            above = ("data", "axes fraction")
            axes.annotate(words, (level, 1.02), xycoords=above, ha="center", fontsize=7)
    axes.set_yticks(range(len(table)), [row.title for row in table])
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(axis="y", color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlim(0, 100)
    which = "the domain left out" if len(shape.tested) == 1 else "domains left out, mean"
    axes.set_xlabel(f"accuracy (%) on {which}")
    axes.set_title(shape.name, pad=16)


def _distances(axes: Axes, table: Sequence[Row]) -> None:
    _dots(axes, table, [row.distance for row in table], "o")
    axes.grid(axis="y", color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(ticks)
    axes.set_xlim(0, ticks.tick_values(0, 1.05 * axes.dataLim.x1)[-1])  # a tick beyond all dots
    axes.set_xlabel("relative to their mean")
    axes.set_title("distance of the domains'\ngradient variances")
