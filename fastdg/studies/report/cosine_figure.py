"""A heat map of the cosines between the domains' gradients over training."""

from __future__ import annotations

import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from ...figure_style import COSINE, STYLE, save
from ..data.digits import TASKS
from ..experiments.settings import ALGORITHMS
from .demo_figure import curves_of


def cosine_figure(results: dict[str, Any], path: Path) -> None:
    """A row a task, a column an algorithm; in each map a row a pair of training domains, a column
    an evaluation. Means over seeds; if several domains are left out in turn, with the first out."""
    plan = results["plan"]
    pairs = {task: _pairs(task) for task in plan["tasks"]}
    heights = [max(2, len(names)) for names in pairs.values()]
    with rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        size = (1.6 + 1.5 * len(plan["algorithms"]), 1.6 + 0.2 * sum(heights))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(
            len(heights), len(plan["algorithms"]), squeeze=False, height_ratios=heights
        )
        for row, (line, task) in enumerate(zip(grid, plan["tasks"], strict=True)):
            for axes, algorithm in zip(line, plan["algorithms"], strict=True):
                curves = curves_of(results, task, algorithm, TASKS[task](0).tested[0])
                steps = [point["step"] for point in curves[0]]
                values = [
                    [
                        statistics.fmean(curve[i]["cosine"][k] for curve in curves)
                        for i in range(len(steps))
                    ]
                    for k in range(len(pairs[task]))
                ]
                axes.imshow(values, **COSINE, aspect="auto", interpolation="nearest")
                axes.set_xticks([0, len(steps) - 1], [str(steps[0]), str(steps[-1])])
                axes.set_yticks([])
                axes.tick_params(length=0)
                if row == 0:
                    axes.set_title(ALGORITHMS[algorithm].title)
            line[0].set_yticks(range(len(pairs[task])), pairs[task])
            line[-1].set_xlabel("step")
        figure.colorbar(ScalarMappable(**COSINE), ax=grid, label="cosine", shrink=0.8)
        figure.suptitle(
            "cosine between the gradients of each pair of training domains", x=0.01, ha="left"
        )
        save(figure, path)


def _pairs(task: str) -> list[str]:
    shape = TASKS[task](0)
    seen = [name for d, name in enumerate(shape.domains) if d != shape.tested[0]]
    return [f"{a},\n{b}" if len(a + b) > 20 else f"{a}, {b}" for a, b in combinations(seen, 2)]
