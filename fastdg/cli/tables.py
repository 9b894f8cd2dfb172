"""Results as tables for the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from ..data.digits import TASKS
from ..report.summary import Estimate, mean_and_error, rows


def _value(estimate: Estimate) -> str:
    mean, error = estimate
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def demo_table(results: dict[str, Any], task: str) -> Table:
    """Accuracy on each domain left out, and what a step costs; a row an algorithm."""
    shape, seeds = TASKS[task](0), results["plan"]["seeds"]
    title = f"{shape.name}: accuracy (%) on the domain left out"
    if seeds > 1:
        title += f", mean ± standard error of {seeds} seeds"
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    table.caption = "domains and mean: checkpoint chosen on the training domains; last: last step"
    table.add_column("algorithm", no_wrap=True)
    several = len(shape.tested) > 1
    for d in shape.tested:
        table.add_column(shape.domains[d], justify="right")
    for name in (*(("mean",) if several else ()), "last", "ms/step", "to ERM", "peak MB"):
        table.add_column(name, justify="right")
    for row in rows(results, task):
        table.add_row(
            row.title,
            *(_value(estimate) for estimate in row.domains.values()),
            *([_value(mean_and_error(row.chosen))] if several else []),
            _value(mean_and_error(row.last)),
            f"{1e3 * row.seconds:.2f}",
            "–" if math.isnan(row.ratio) else f"{row.ratio:.2f}×",
            f"{row.peak_bytes / 1e6:.1f}",
        )
    return table


def colored_mnist_table(results: dict[str, Any]) -> Table:
    """Final accuracies beside the paper's."""
    title = "ColoredMNIST: final accuracy (%), mean ± standard deviation"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("algorithm", "on", "here", "paper", "reproduced", "s/step"):
        table.add_column(name)
    for name, entry in results["algorithms"].items():
        restarts = entry["restarts"]
        seconds = sum(restart["seconds_per_step"] for restart in restarts) / len(restarts)
        for key, value in entry["summary"].items():
            mean, std = value["paper"]
            within = "[green]yes[/]" if value["within"] else "[red]no[/]"
            table.add_row(
                f"{name} ({len(restarts)} restarts)" if key == "train" else "",
                key,
                f"{value['mean']:.1f} ± {value['std']:.1f}",
                f"{mean:.1f} ± {std:.1f}",
                f"{within} (within {value['tolerance']:.1f})",
                f"{seconds:.2f}" if key == "train" else "",
            )
    return table
