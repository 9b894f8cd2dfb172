"""ColoredMNIST's figure: accuracies over training, and the final ones beside the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...figure_style import STYLE, save
from ..experiments.colored_mnist import PAPER

SHADES = {"train": "#7f7f7f", "test": "#d55e00", "grey": "#0072b2"}
TITLES = {"erm": "ERM", "fishr": "Fishr, head"}


def colored_mnist_figure(results: dict[str, Any], path: Path) -> None:
    """A panel an algorithm with every restart's curves, and one with the final accuracies."""
    names = list(results["algorithms"])
    with rc_context(STYLE):
        figure = Figure(figsize=(3.2 * (len(names) + 1), 3.0), layout="constrained")
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
        for key, colour in SHADES.items():
            values = [point[key] for point in restart["curve"]]
            axes.plot(steps, values, color=colour, lw=1.1, alpha=0.8)
    axes.axhline(75, color="black", lw=0.7, ls="--", zorder=0)
    last = results["protocol"]["steps"]
    axes.text(last, 76, "best without colour", fontsize=7, ha="right")
    axes.axvline(results["protocol"]["anneal_steps"], color="black", lw=0.7, ls=":", zorder=0)
    axes.set_xlabel("step (dotted: the penalty gets its weight)")
    axes.set_title(f"{TITLES[name]}, {len(restarts)} restarts")


def _final(axes: Axes, results: dict[str, Any], names: list[str]) -> None:
    for group, name in enumerate(names):
        for k, (key, colour) in enumerate(SHADES.items()):
            here, at = results["algorithms"][name]["summary"][key], group + (k - 1) * 0.27
            axes.bar(
                at,
                here["mean"],
                0.24,
                yerr=here["std"],
                color=colour,
                error_kw={"lw": 0.8},
                capsize=2,
                label={"grey": "grey test", "test": "test, colour misleads"}.get(key, key)
                if group == 0
                else None,
            )
            mean, std = PAPER[name][key]
            first = "paper" if group + k == 0 else None
            axes.errorbar(at, mean, std, fmt="D", color="black", ms=3, lw=0.8, label=first)
    axes.axhline(75, color="black", lw=0.7, ls="--", zorder=0)
    axes.set_ylim(0, 100)
    axes.set_xticks(range(len(names)), [TITLES[name] for name in names])
    axes.set_title("final, mean ± std, beside the paper")
