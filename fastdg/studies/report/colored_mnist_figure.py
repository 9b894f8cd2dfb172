"""ColoredMNIST's figure: accuracies over training, and the final ones beside the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...figure_style import PAGE, PARTS, STYLE, save
from ..catalogue import ALGORITHMS
from ..experiments.colored_mnist import PAPER
from .summary import ordered

LABELS = {"train": "train", "test": "test, colour misleads", "grey": "grey test"}


def colored_mnist_figure(results: dict[str, Any], path: Path) -> None:
    """A panel an algorithm with every restart's curves, and one with the final accuracies."""
    names = ordered(results["algorithms"])
    with rc_context(STYLE):
        figure = Figure(figsize=(PAGE, 2.6), layout="constrained")
        panels = list(figure.subplots(1, len(names) + 1, sharey=True))
        for axes, name in zip(panels, names, strict=False):
            _over_training(axes, results, name)
        _final(panels[-1], results, names)
        panels[0].set_ylabel("accuracy (%)")
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        save(figure, path)


def _over_training(axes: Axes, results: dict[str, Any], name: str) -> None:
    restarts = results["algorithms"][name]["restarts"]
    for restart in restarts:
        steps = [point["step"] for point in restart["curve"]]
        for key, colour in PARTS.items():
            values = [point[key] for point in restart["curve"]]
            axes.plot(steps, values, color=colour, lw=1.1, alpha=0.8)
    axes.axhline(75, color="black", lw=0.7, ls="--", zorder=0)
    last = results["protocol"]["steps"]
    axes.text(last, 76, "best without colour", fontsize=7, ha="right")
    axes.axvline(results["protocol"]["anneal_steps"], color="black", lw=0.7, ls=":", zorder=0)
    axes.set_xlabel("step (dotted: full penalty)")
    axes.set_title(f"{ALGORITHMS[name].title}, {len(restarts)} seeds")


def _final(axes: Axes, results: dict[str, Any], names: list[str]) -> None:
    for group, name in enumerate(names):
        for k, (key, colour) in enumerate(PARTS.items()):
            here, at = results["algorithms"][name]["summary"][key], group + (k - 1) * 0.27
            axes.bar(
                at,
                here["mean"],
                0.24,
                yerr=here["std"],
                color=colour,
                error_kw={"lw": 0.8},
                capsize=2,
                label=LABELS[key] if group == 0 else None,
            )
            mean, std = PAPER[name][key]
            first = "paper" if group + k == 0 else None
            axes.errorbar(at, mean, std, fmt="D", color="black", ms=3, lw=0.8, label=first)
    axes.axhline(75, color="black", lw=0.7, ls="--", zorder=0)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(len(names)), [ALGORITHMS[name].title for name in names])
    axes.set_title("final, mean ± std")
