"""The demo's results as tables for the terminal: a row an algorithm, plain training first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ..studies.data.digits import TASKS
from ..studies.report.summary import STUDENT, Estimate, Row, difference, mean_and_error, rows


def demo_tables(results: dict[str, Any], task: str, width: int) -> Iterator[Table | str]:
    """Accuracy beside plain training's, and the levels to compare it with; on each domain left out,
    if there are several, in at most ``width`` characters; and the cost of a step."""
    table = rows(results, task)
    yield _accuracies(task, table)
    yield _levels(task, results["plan"]["seeds"])
    if len(table[0].domains) > 1:
        yield _domains(task, table, width)
    yield _costs(task, table)


def value(estimate: Estimate) -> str:
    """Mean ± standard error; the mean alone, if there is no error."""
    mean, error = estimate
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def legend(seeds: int) -> str:
    """Return what the columns mean, and the test behind the stars."""
    words = (
        "last: after the last step; chosen: the checkpoint that was best on the training domains' "
        "held-out parts"
    )
    if seeds > 1:
        freedom = seeds - 1
        words += (
            "\n± standard error over seeds; gain: mean of the differences to ERM with the same "
            "seed"
            f"\n* the 95 % interval of the gain leaves out 0 (two-sided t-test, {freedom} "
            f"degree{'s' * (freedom > 1)} of freedom: {STUDENT[min(freedom, len(STUDENT)) - 1]} "
            "standard errors; not corrected for the number of algorithms)"
        )
    return words


def _new(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _accuracies(task: str, table: list[Row]) -> Table:
    shape = TASKS[task](0)
    which = "the domain left out" if len(shape.tested) == 1 else "domains left out, mean"
    found = _new(f"{shape.name}: accuracy (%) on {which}", "last", "gain", "chosen", "gain")
    first = table[0]  # plain training, if it is there
    for row in table:
        cells = []
        for own, plain in ((row.last, first.last), (row.chosen, first.chosen)):
            compared = row is not first and first.algorithm == "erm"
            cells += [value(mean_and_error(own)), _gain(own, plain) if compared else ""]
        found.add_row(row.title, *cells)
    return found


def _levels(task: str, seeds: int) -> str:
    shape = TASKS[task](0)
    levels = [(100 / shape.classes, "guessing"), (shape.cue, "the misleading cue alone")]
    levels.append((shape.best, "at best without it"))
    words = ", ".join(f"{words} {level:.0f}" for level, words in levels if level)
    return f"{words}; {seeds} seed{'s' * (seeds > 1)}"


def _gain(row: list[float], plain: list[float]) -> str:
    (gain, error), clear = difference(row, plain)
    if math.isnan(error):
        return f"{gain:+.1f}"
    return f"{gain:+.1f} ± {error:.1f}{'*' if clear else ' '}"


def _domains(task: str, table: list[Row], width: int) -> Table:
    names = list(table[0].domains)
    title = f"{TASKS[task](0).name}: accuracy (%) of the chosen checkpoint, by the domain left out"
    found = _new(title, *names)
    cells = [[value(row.domains[name]) for name in names] for row in table]
    first = max(len(row.title) for row in table)
    if first + sum(max(map(len, of)) + 3 for of in zip(*cells, strict=True)) + 4 > width:
        cells = [[f"{row.domains[name][0]:.1f}" for name in names] for row in table]
    for row, of in zip(table, cells, strict=True):
        found.add_row(row.title, *of)
    return found


def _costs(task: str, table: list[Row]) -> Table:
    title = f"{TASKS[task](0).name}: cost of a step, medians of all runs"
    found = _new(title, "ms", "× ERM", "peak memory (MB)")
    for row in table:
        ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
        found.add_row(row.title, f"{1e3 * row.seconds:.1f}", ratio, f"{row.peak_bytes / 1e6:.1f}")
    return found
