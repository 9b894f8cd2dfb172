"""The benchmark's figure: the difference of every algorithm to ERM, on average and by data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...figure_style import STYLE, save
from ..benchmark.algorithms import AGAIN
from ..benchmark.datasets import DATASETS
from .benchmark_summary import ERM, standings
from .summary import Estimate

Gain = tuple[Estimate, bool]
BETTER, WORSE, UNCLEAR, BAND = "#0072b2", "#d55e00", "#8c8c8c", "#e8e8e8"
FAR = 10.0  # per cent points to the left; what lies beyond is written


def benchmark_figure(summary: Mapping[str, Any], path: Path) -> None:
    """Draw a line an algorithm, from the largest gain over ERM to the least, and a panel for the
    average and for each data set. Grey: ERM's difference to itself with other random numbers."""
    lines = [s for s in standings(summary) if s.algorithm != ERM]
    again = next((s for s in lines if s.algorithm == AGAIN), None)
    panels: list[tuple[str, list[Gain], Gain | None]] = [
        ("average", [s.gain for s in lines], again.gain if again else None)
    ]
    for name in summary["datasets"]:
        own = again.gains[name] if again else None
        panels.append((DATASETS[name].title, [s.gains[name] for s in lines], own))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 1.1 + 0.152 * len(lines)), layout="constrained")
        grid = figure.subplots(
            1, len(panels), sharey=True, squeeze=False, width_ratios=[1.5] + [1] * (len(panels) - 1)
        )
        for axes, (title, gains, own) in zip(grid[0], panels, strict=True):
            _panel(axes, title, gains, own)
        first = grid[0][0]
        first.set_yticks(range(len(lines)), [s.title for s in lines], fontsize=7)
        first.set_ylim(len(lines) - 0.4, -0.6)
        seeds = summary["seeds"]
        spread = f"mean ± standard error of {seeds} seeds; " if seeds > 1 else ""
        figure.supxlabel(
            f"accuracy on the domain left out, difference to ERM (points)\n{spread}"
            "filled: the 95 % interval leaves out 0; grey: ERM drawn anew, ± 2 standard errors",
            fontsize=7.5,
        )
        save(figure, path, dpi=150)


def _panel(
    axes: Axes,
    title: str,
    gains: Sequence[Gain],
    again: Gain | None,
) -> None:
    if again is not None and not math.isnan(again[0][1]):
        reach = 2 * again[0][1]
        axes.axvspan(-reach, reach, color=BAND, lw=0, zorder=0)
    axes.axvline(0, color="black", lw=0.7, zorder=1)
    near = [
        gain + sign * (0 if math.isnan(error) else error)
        for (gain, error), _ in gains
        for sign in (-1, 1)
        if gain >= -FAR
    ]
    low, high = min([*near, -1.0]), max([*near, 1.0])
    room = 0.06 * (high - low)
    low, high = low - room, high + room
    for k, ((gain, error), clear) in enumerate(gains):
        colour = (BETTER if gain > 0 else WORSE) if clear else UNCLEAR
        if gain < -FAR:
            axes.annotate(
                f"◂ −{-gain:.0f}",
                (low, k),
                xytext=(1, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                color=colour,
            )
            continue
        axes.errorbar(
            gain,
            k,
            xerr=0 if math.isnan(error) else error,
            fmt="o",
            ms=3.2,
            lw=0.9,
            color=colour,
            mfc=colour if clear else "white",
        )
    axes.set_xlim(low, high)
    axes.set_title(title, fontsize=8)
    axes.grid(axis="y", lw=0.3, color="#dddddd")
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
