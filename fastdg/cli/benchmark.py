"""The command ``fastdg benchmark``."""

from __future__ import annotations

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
    training,
)


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
        side_by_side = processes(workers)
        counted = ", ".join(
            f"{n} {what}{'s' * (n > 1)}"
            for n, what in ((len(plan.algorithms), "algorithm"), (plan.seeds, "seed"))
        )
        tried = f"{plan.trials} setting{'s' * (plan.trials > 1)} of {plan.steps} steps"
        console.print(
            f"{', '.join(plan.present())}: {counted}; a search tries {tried}", highlight=False
        )
        note = f", {side_by_side} side by side" if side_by_side > 1 else ""
        with training("searches", note=note) as show:
            results = run(plan, out / "results.json", fresh, show, side_by_side)
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
