"""The command ``fastdg benchmark``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..files import replace
from ..studies.benchmark.algorithms import CONTENDERS
from ..studies.benchmark.datasets import DATASETS
from ..studies.benchmark.plan import SEEDS, STEPS, TRIALS, Plan, run
from ..studies.experiments.settings import EVALUATIONS
from .options import (
    Fresh,
    Out,
    Seeds,
    Workers,
    console,
    errors,
    names,
    processes,
    several,
    steps_option,
)

EVERY = 15.0  # seconds between two lines of progress
FIRST = 40  # units after which the duration is told, at the latest


def benchmark(
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="FASTDG_DATA",
            help="Folder of the data sets; one that is not there is left out.",
        ),
    ] = None,
    datasets: Annotated[list[str] | None, several(tuple(DATASETS))] = None,
    algorithms: Annotated[list[str] | None, several(tuple(CONTENDERS))] = None,
    seeds: Seeds = SEEDS,
    trials: Annotated[
        int, typer.Option(help="Settings that are searched, the defaults first: 1 or more.")
    ] = TRIALS,
    steps: Annotated[int, steps_option(EVALUATIONS)] = STEPS,
    out: Out = Path("fastdg-benchmark"),
    workers: Workers = None,
    fresh: Fresh = False,
) -> None:
    """Search and train all algorithms on small data sets, each domain left out in turn.

    DomainBed's protocol: random search, chosen on the training domains. Half an hour of a core for
    four data sets. A run that was killed goes on where it was.
    """
    from ..studies.report.benchmark_figure import benchmark_figure
    from ..studies.report.benchmark_summary import condensed, lines, words
    from ..studies.report.benchmark_table import (
        CAPTION,
        accuracies,
        comparison,
        markdown,
        title,
    )

    with errors():
        plan = Plan(
            data,
            names(datasets, tuple(DATASETS)),
            names(algorithms, tuple(CONTENDERS)),
            seeds,
            trials,
            steps,
        )
        for said in plan.skipped():
            console.print(said, soft_wrap=True, highlight=False)
        with _progress(plan) as show:
            results = run(plan, out / "results.json", fresh, show, processes(workers))
        summary = condensed(results)
        replace(out / "summary.json", lambda file: file.write(lines(summary).encode()))
        if "erm" not in plan.algorithms:
            for name in ("table.md", "figure.png"):  # of an earlier summary
                (out / name).unlink(missing_ok=True)
            console.print(f"Results: {out / 'summary.json'}. Run erm, too, to compare with it.")
            return
        for heading, (head, rows) in (
            (title(summary), accuracies(summary)),
            ("Against ERM", comparison(summary)),
        ):
            table = Table(title=heading, title_justify="left", title_style="bold")
            for name in head:
                table.add_column(name, justify="right" if name else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        console.print(CAPTION, style="dim", highlight=False)
        for sentence in words(summary):
            console.print(sentence, highlight=False)
        replace(out / "table.md", lambda file: file.write(markdown(summary).encode()))
        benchmark_figure(summary, out / "figure.png")
    console.print(
        f"Figure: {out / 'figure.png'}\nTable: {out / 'table.md'}\n"
        f"Results: {out / 'summary.json'}, of each run {out / 'results.json'}"
    )


@contextmanager
def _progress(plan: Plan) -> Iterator[Callable[[str, int, int], None]]:
    """Print a line from time to time; yield a function that takes the unit, the number done and the
    total."""
    console.print(
        f"{len(plan.present())} data sets ({', '.join(plan.present())}), {len(plan.algorithms)} "
        f"algorithms, {plan.seeds} seeds, {plan.trials} settings of {plan.steps} steps",
        highlight=False,
    )
    began = told = time.monotonic()
    start = -1

    def show(name: str, done: int, total: int) -> None:
        nonlocal told, start
        now = time.monotonic()
        if start < 0:
            start = done
            before = f", {done} of them before" if done else ""
            console.print(f"{total} units{before}; began", highlight=False)
            return
        first = done - start == min(FIRST, len(plan.algorithms), total - start)
        if not first and now - told < EVERY and done < total:
            return
        told = now
        left = (now - began) / (done - start) * (total - done)
        console.print(
            f"{done} of {total} after {_clock(now - began)}, about {_clock(left)} left: {name}",
            highlight=False,
        )

    try:
        yield show
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130) from None


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{minutes} min"
