"""A heat map of the cosines between the domains' gradients over training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from ...figure_style import COSINE, PAGE, STYLE, save
from ..data.digits import TASKS
from ..experiments.settings import ALGORITHMS
from .summary import ordered
from .variance_figure import curves_of

MOST = 5  # maps side by side


def cosine_figure(results: dict[str, Any], path: Path) -> None:
    """Of each task maps of all algorithms, `MOST` side by side; in each map a row a pair of
    training domains, a column an evaluation. Means over seeds; if several domains are left out in
    turn, with the first out."""
    names = ordered(results["plan"]["algorithms"])
    lines = math.ceil(len(names) / MOST)
    tasks = results["plan"]["tasks"]
    pairs = {task: _pairs(task) for task in tasks}
    heights = [0.42 + 0.14 * max(3, len(pairs[task])) for task in tasks for _ in range(lines)]
    with rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(PAGE, 1.1 + sum(heights)), layout="constrained")
        wide = min(MOST, len(names))
        grid = figure.subplots(len(heights), wide, squeeze=False, height_ratios=heights)
        panels = iter(grid)
        for task in tasks:
            for first in range(0, len(names), MOST):
                line = next(panels)
                for axes in line:
                    axes.set_axis_off()
                for axes, algorithm in zip(line, names[first : first + MOST], strict=False):
                    axes.set_axis_on()
                    _map(axes, results, task, algorithm, len(pairs[task]))
                line[0].set_yticks(range(len(pairs[task])), pairs[task])
        figure.colorbar(
            ScalarMappable(**COSINE),
            ax=grid,
            label="cosine",
            location="bottom",
            shrink=0.5,
            aspect=40,
            ticks=[-1, -0.5, 0, 0.5, 1],
        )
        figure.suptitle(
            "cosine between the gradients of each pair of training domains, from the first to the "
            "last step\n(blue: they agree, red: they conflict)",
            x=0.01,
            ha="left",
            fontsize=9,
        )
        save(figure, path)


def _map(axes: Axes, results: dict[str, Any], task: str, algorithm: str, pairs: int) -> None:
    curves: Sequence[Any] = curves_of(results, task, algorithm, TASKS[task](0).tested[0])
    steps = [point["step"] for point in curves[0]]
    values = [
        [statistics.fmean(curve[i]["cosine"][k] for curve in curves) for i in range(len(steps))]
        for k in range(pairs)
    ]
    axes.imshow(values, **COSINE, aspect="auto", interpolation="nearest")
    axes.set_xticks([0, len(steps) - 1], [str(steps[0]), str(steps[-1])])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.set_title(ALGORITHMS[algorithm].title, fontsize=8)


def _pairs(task: str) -> list[str]:
    shape = TASKS[task](0)
    seen = [name for d, name in enumerate(shape.domains) if d != shape.tested[0]]
    return [f"{a},\n{b}" if len(a + b) > 20 else f"{a}, {b}" for a, b in combinations(seen, 2)]
