"""The commands. They parse, show and draw; what they run is in `fastdg.experiments`."""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__, backends
from ..data.digits import TASKS
from ..experiments import demo as demo_experiment
from ..experiments.training import ALGORITHMS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Gradient statistics and algorithms for domain generalisation.",
    pretty_exceptions_enable=False,
)
reproduce = typer.Typer(no_args_is_help=True, help="Re-run published experiments to the letter.")
app.add_typer(reproduce, name="reproduce")
console = Console(width=None if sys.stdout.isatty() else 110)


@contextmanager
def _said() -> Iterator[None]:
    """Errors a user can act on, as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        console.print(f"[red]fastdg:[/] {error}", highlight=False)
        raise typer.Exit(2) from error


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@app.command()
def info() -> None:
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
        table.add_row(name, "[green]yes[/]" if available else "no", reason)
    console.print(table)


@app.command()
def demo(
    algorithms: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(ALGORITHMS)}; repeat for several.")
    ] = None,
    datasets: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(TASKS)}; repeat for several.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each, with seeds 0, 1, ...")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = 300,
    output: Annotated[Path, typer.Option(help="Folder for results and figure.")] = Path(
        "fastdg-demo"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore earlier results.")] = False,
) -> None:
    """Train on real handwritten digits of several domains; compare, time and draw.

    A run that was killed goes on where it was.
    """
    from ..report.figures import demo_figure

    with _said():
        plan = demo_experiment.Plan(
            tuple(algorithms or ALGORITHMS), tuple(datasets or TASKS), seeds, steps
        )
        output.mkdir(parents=True, exist_ok=True)
        with _progress() as bars:
            bar = bars.add_task("training", total=None)

            def progress(key: str, done: int, total: int) -> None:
                bars.update(bar, description=key or "done", completed=done, total=total)

            results = demo_experiment.run(plan, output / "results.json", fresh, progress)
        for task in plan.tasks:
            console.print(_table(results, task))
        for task in plan.tasks:
            console.print(demo_experiment.closing_words(results, task), highlight=False)
        demo_figure(results, output / "figure.png")
    console.print(f"Figure: {output / 'figure.png'}   Results: {output / 'results.json'}")


def _value(pair: tuple[float, float]) -> str:
    mean, error = pair
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def _table(results: dict[str, Any], task: str) -> Table:
    shape = TASKS[task](0)
    table = Table(title=f"{shape.name}: accuracy (%) on the domain left out", title_justify="left")
    table.add_column("algorithm", no_wrap=True)
    several = len(shape.tested) > 1
    for d in shape.tested:
        table.add_column(shape.domains[d], justify="right")
    if several:
        table.add_column("mean", justify="right")
    for name in ("ms/step", "to ERM", "peak MB"):
        table.add_column(name, justify="right")
    for row in demo_experiment.rows(results, task):
        table.add_row(
            row.title,
            *(_value(pair) for pair in row.accuracy.values()),
            *([_value(row.mean)] if several else []),
            f"{1e3 * row.step_seconds:.2f}",
            "–" if math.isnan(row.ratio) else f"{row.ratio:.2f}×",
            "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
        )
    return table


@reproduce.command("colored-mnist")
def colored_mnist(
    data: Annotated[
        Path | None,
        typer.Option(envvar="FASTDG_DATA", help="Folder with MNIST's idx files."),
    ] = None,
    algorithms: Annotated[
        list[str] | None, typer.Option(help="erm, fishr; repeat for several.")
    ] = None,
    restarts: Annotated[int, typer.Option(help="Runs of each, with seeds 0, 1, ...")] = 10,
    output: Annotated[Path, typer.Option(help="Folder for results and figure.")] = Path(
        "fastdg-colored-mnist"
    ),
) -> None:
    """ColoredMNIST as in the Fishr paper's own script; about 10 minutes a restart on 2 cores."""
    from ..experiments import colored_mnist as experiment
    from ..report.figures import colored_mnist_figure

    with _said():
        if data is None:
            raise ValueError(
                "--data: expected the folder with MNIST's idx files (or set FASTDG_DATA); see "
                "README"
            )
        output.mkdir(parents=True, exist_ok=True)
        command = " ".join(["fastdg", *sys.argv[1:]])
        with _progress() as bars:
            bar = bars.add_task("training", total=None)

            def progress(name: str, done: int, total: int) -> None:
                bars.update(bar, description=name, completed=done, total=total)

            results = experiment.run_all(
                tuple(algorithms or experiment.ALGORITHMS),
                restarts,
                data,
                output,
                command,
                progress,
            )
        table = Table(title="ColoredMNIST: final accuracy (%), mean ± std", title_justify="left")
        for column in ("algorithm", "environment", "here", "paper", "within"):
            table.add_column(column)
        for name, entry in results["algorithms"].items():
            for key, value in entry["summary"].items():
                table.add_row(
                    name,
                    key,
                    f"{value['mean']:.1f} ± {value['std']:.1f}",
                    f"{value['paper'][0]:.1f} ± {value['paper'][1]:.1f}",
                    "[green]yes[/]" if value["within"] else f"[red]no[/] (±{value['tolerance']})",
                )
        console.print(table)
        colored_mnist_figure(results, output / "figure.png")
    console.print(f"Figure: {output / 'figure.png'}   Results: {output / 'results.json'}")
