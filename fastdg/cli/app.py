"""The commands. They parse, show and draw; `fastdg.studies` has the experiments they run."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table

from .. import __version__, backends
from ..studies.catalogue import ALGORITHMS as EVERY
from ..studies.catalogue import FAMILIES
from ..studies.data.digits import TASKS
from ..studies.experiments import colored_mnist as experiment
from ..studies.experiments import demo as demo_experiment
from ..studies.experiments import pacs as pacs_experiment
from ..studies.experiments.settings import ALGORITHMS, DEFAULT, SETTINGS
from ..studies.experiments.units import check_names
from .benchmark import benchmark
from .catalogue import algorithms_table, costs_table, described
from .demo_tables import demo_tables, legend
from .options import (
    CONTEXT,
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
from .tables import ROUTE, colored_mnist_table, ops_table, pacs_table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings=CONTEXT,
    help="Gradient statistics and algorithms for domain generalisation.",
    pretty_exceptions_enable=False,
)
reproduce = typer.Typer(no_args_is_help=True, help="Re-run published experiments to the letter.")
app.add_typer(reproduce, name="reproduce")
app.command()(benchmark)


def _version(asked: bool) -> None:
    if asked:
        console.print(f"fastdg {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Gradient statistics and algorithms for domain generalisation."""


@app.command()
def info(
    why: Annotated[
        bool, typer.Option("--why", help="Show which backends compute each op.")
    ] = False,
) -> None:
    """Versions, the backends that are here, and why one is not."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    cuda = torch.version.cuda or "none (CPU build)"
    if torch.cuda.is_available():
        cuda += f", {torch.cuda.get_device_name()}"
    versions = Table(title="fastdg", title_justify="left", show_header=False, box=None)
    for name, value in (
        ("fastdg", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton_version),
        ("CUDA of torch", cuda),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        ("FASTDG_BACKEND", os.environ.get("FASTDG_BACKEND", "not set: the fastest present")),
    ):
        versions.add_row(name, str(value))
    console.print(versions)
    table = Table(title="backends", title_justify="left")
    for column in ("name", "here", "why"):
        table.add_column(column)
    for name, (available, reason) in backends().items():
        table.add_row(name, "[green]yes[/]" if available else "no", escape(reason))
    console.print(table)
    if why:
        console.print(ops_table())
        console.print(ROUTE, highlight=False, soft_wrap=True)


@app.command("list")
def catalogue(
    algorithms: Annotated[
        list[str] | None,
        typer.Argument(help="Say all about these; case and hyphens do not count.", metavar="NAME"),
    ] = None,
    family: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(FAMILIES)}.", show_default="all")
    ] = None,
) -> None:
    """All algorithms: the gradient that each steps along, what it costs, and its paper."""
    with errors():
        chosen = names(algorithms, tuple(EVERY))
        check_names("algorithms", chosen, tuple(EVERY))
        families = names([family] if family else None, tuple(FAMILIES))
        check_names("family", families, tuple(FAMILIES))
        if algorithms:
            console.print(*map(described, chosen), sep="\n\n", highlight=False, soft_wrap=True)
            return
        for each in families:
            console.print(algorithms_table(each))
        console.print(costs_table())


@app.command()
def demo(
    algorithms: Annotated[list[str] | None, several(tuple(ALGORITHMS), DEFAULT)] = None,
    datasets: Annotated[list[str] | None, several(tuple(TASKS))] = None,
    seeds: Seeds = 3,
    steps: Annotated[
        int | None,
        steps_option(
            demo_experiment.LEAST, ", ".join(f"{SETTINGS[task].steps} {task}" for task in TASKS)
        ),
    ] = None,
    out: Out = Path("fastdg-demo"),
    workers: Workers = None,
    fresh: Fresh = False,
) -> None:
    """Train on real handwritten digits of several domains; compare, time and draw.

    A run that was killed goes on where it was.
    """
    from ..studies.report.cosine_figure import cosine_figure
    from ..studies.report.demo_figure import demo_figure
    from ..studies.report.summary import closing_words
    from ..studies.report.variance_figure import variance_figure

    with errors():
        plan = demo_experiment.Plan(
            names(algorithms, tuple(ALGORITHMS), DEFAULT),
            names(datasets, tuple(TASKS)),
            seeds,
            steps,
        )
        side_by_side = processes(workers)
        for task in plan.tasks:
            shape = TASKS[task](0)
            console.print(f"{shape.name}: {shape.story}.", highlight=False)
        note = f", {side_by_side} side by side" if side_by_side > 1 else ""
        with training("runs", plan.seconds() / side_by_side, note) as show:
            results = demo_experiment.run(plan, out / "results.json", fresh, show, side_by_side)
        for task in plan.tasks:
            console.print()
            for table in demo_tables(results, task, console.width):
                console.print(table, highlight=False)
        console.print(legend(plan.seeds), highlight=False)
        for task in plan.tasks:
            console.print()
            for words in closing_words(results, task):
                console.print(words, highlight=False)
        figures = {"figure.png": demo_figure, "variances.png": variance_figure}
        figures["cosines.png"] = cosine_figure
        for name, draw in figures.items():
            draw(results, out / name)
    console.print(
        f"\nFigures: {', '.join(str(out / name) for name in figures)}\n"
        f"Results: {out / 'results.json'}"
    )


@reproduce.command("colored-mnist")
def colored_mnist(
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="FASTDG_DATA", help="Folder of MNIST's idx files, or of their folder mnist/."
        ),
    ] = None,
    algorithms: Annotated[list[str] | None, several(experiment.ALGORITHMS)] = None,
    seeds: Seeds = 10,
    out: Out = Path("fastdg-colored-mnist"),
    fresh: Fresh = False,
) -> None:
    """ColoredMNIST as in the Fishr paper's own script; some 10 minutes a run on 2 cores.

    501 full-batch steps each, one run after the other on all cores. A run that was killed goes on
    where it was.
    """
    from ..studies.report.colored_mnist_figure import colored_mnist_figure

    with errors():
        if data is None:
            raise ValueError(
                "--data: expected the folder of MNIST's four idx files, got none. Pass it, or set "
                "FASTDG_DATA."
            )
        chosen = names(algorithms, experiment.ALGORITHMS)
        with training("steps") as show:
            results = experiment.run_all(chosen, seeds, data, out, show, fresh=fresh)
        console.print(colored_mnist_table(results))
        colored_mnist_figure(results, out / "figure.png")
    console.print(f"Figure: {out / 'figure.png'}\nResults: {out / 'results.json'}")


@app.command()
def pacs(
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="FASTDG_DATA",
            help="Folder with pacs/<domain>/<class>/<image> and weights/resnet20-12fca82f.th.",
        ),
    ] = None,
    algorithms: Annotated[
        list[str] | None, several(tuple(pacs_experiment.ALGORITHMS), pacs_experiment.DEFAULT)
    ] = None,
    seeds: Seeds = 3,
    steps: Annotated[int, steps_option(pacs_experiment.EVALUATIONS)] = pacs_experiment.STEPS,
    out: Out = Path("fastdg-pacs"),
    workers: Workers = None,
    fresh: Fresh = False,
) -> None:
    """Fine-tune CIFAR-10's ResNet-20 on PACS at 32x32, each domain left out in turn.

    An hour or more on two cores. A run that was killed goes on where it was.
    """
    from ..studies.report.pacs_figure import pacs_figure

    with errors():
        if data is None:
            raise ValueError(
                "--data: expected the folder that holds pacs/ and weights/, got none. Pass it, or "
                "set FASTDG_DATA."
            )
        chosen = names(algorithms, tuple(pacs_experiment.ALGORITHMS), pacs_experiment.DEFAULT)
        plan = pacs_experiment.Plan(data, chosen, seeds, steps)
        side_by_side = processes(workers)
        with training("runs", plan.seconds() / side_by_side) as show:
            results = pacs_experiment.run(plan, out / "results.json", fresh, show, side_by_side)
        console.print(pacs_table(results))
        pacs_figure(results, out / "figure.png")
    console.print(f"Figure: {out / 'figure.png'}\nResults: {out / 'results.json'}")
