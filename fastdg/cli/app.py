"""The commands. They parse, show and draw; `fastdg.studies` has the experiments they run."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .. import __version__, backends
from ..studies.data.digits import TASKS
from ..studies.experiments import colored_mnist as experiment
from ..studies.experiments import demo as demo_experiment
from ..studies.experiments import pacs as pacs_experiment
from ..studies.experiments.settings import ALGORITHMS, DEFAULT
from ..studies.experiments.units import cores
from .tables import ROUTE, colored_mnist_table, demo_tables, ops_table, pacs_table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Gradient statistics and algorithms for domain generalisation.",
    pretty_exceptions_enable=False,
)
reproduce = typer.Typer(no_args_is_help=True, help="Re-run published experiments to the letter.")
app.add_typer(reproduce, name="reproduce")
# Options that several commands have
Seeds = Annotated[int, typer.Option(help="Runs of each, with seeds 0, 1, ...")]
Workers = Annotated[
    int | None,
    typer.Option(help="Runs side by side, each on one core.", show_default="every core"),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Ignore earlier results.")]
console = Console(width=None if sys.stdout.isatty() else 110)


def _several(known: Iterable[str], default: Iterable[str] = ()) -> Any:
    by_default = ", ".join(default) or "all"
    return typer.Option(
        help=f"Some of {', '.join(known)}; {by_default} by default.", metavar="NAME,NAME"
    )


def _names(given: list[str] | None) -> tuple[str, ...]:
    """``--algorithms erm,fishr`` or ``--algorithms erm --algorithms fishr``; each once."""
    names = [name.strip() for text in given or () for name in text.split(",")]
    return tuple(dict.fromkeys(names))


@contextmanager
def _said() -> Iterator[None]:
    """Errors a user can act on, as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        words = str(error)
        if isinstance(error, OSError) and error.strerror:
            words = f"{error.filename or 'error'}: {error.strerror}"
        console.print(Text.assemble(("fastdg: ", "red"), words), soft_wrap=True)
        raise typer.Exit(2) from error


@contextmanager
def _training() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar; yield a function that takes the unit, the number done and the total."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as bars:
            bar = bars.add_task("training", total=None)

            def show(name: str, done: int, total: int) -> None:
                bars.update(bar, description=name or "done", completed=done, total=total)
                tenth = done > 0 and done * 10 // total > (done - 1) * 10 // total
                if tenth and not console.is_terminal:  # in a file or pipe the bar shows at its end
                    console.print(f"{done} of {total} done", highlight=False)

            yield show
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130) from None


def _processes(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected >= 1, got {workers}. Pass a larger number.")
    return workers or cores()


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


@app.command()
def demo(
    algorithms: Annotated[list[str] | None, _several(ALGORITHMS, DEFAULT)] = None,
    datasets: Annotated[list[str] | None, _several(TASKS)] = None,
    seeds: Seeds = 3,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of a run.", show_default="the task's own")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for results and figure.")] = Path(
        "fastdg-demo"
    ),
    workers: Workers = None,
    fresh: Fresh = False,
) -> None:
    """Train on real handwritten digits of several domains; compare, time and draw.

    A run that was killed goes on where it was.
    """
    from ..studies.report.cosine_figure import cosine_figure
    from ..studies.report.demo_figure import demo_figure
    from ..studies.report.summary import closing_words

    with _said():
        plan = demo_experiment.Plan(
            _names(algorithms) or DEFAULT, _names(datasets) or tuple(TASKS), seeds, steps
        )
        processes = _processes(workers)
        with _training() as show:
            results = demo_experiment.run(plan, output / "results.json", fresh, show, processes)
        for task in plan.tasks:
            for table in demo_tables(results, task, console.width):
                console.print(table)
        for task in plan.tasks:
            for words in closing_words(results, task):
                console.print(words, highlight=False)
            console.print()
        demo_figure(results, output / "figure.png")
        cosine_figure(results, output / "cosines.png")
    console.print(
        f"Figures: {output / 'figure.png'}, {output / 'cosines.png'}\n"
        f"Results: {output / 'results.json'}"
    )


@reproduce.command("colored-mnist")
def colored_mnist(
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="FASTDG_DATA", help="Folder of MNIST's idx files, or of their folder mnist/."
        ),
    ] = None,
    algorithms: Annotated[list[str] | None, _several(experiment.ALGORITHMS)] = None,
    restarts: Seeds = 10,
    output: Annotated[Path, typer.Option(help="Folder for results and figure.")] = Path(
        "fastdg-colored-mnist"
    ),
    fresh: Fresh = False,
) -> None:
    """ColoredMNIST as in the Fishr paper's own script; some 10 minutes a restart on 2 cores.

    A run that was killed goes on where it was.
    """
    from ..studies.report.colored_mnist_figure import colored_mnist_figure

    with _said():
        if data is None:
            raise ValueError(
                "--data: expected the folder of MNIST's four idx files, got none. Pass it, or set "
                "FASTDG_DATA."
            )
        chosen = _names(algorithms) or experiment.ALGORITHMS
        with _training() as show:
            results = experiment.run_all(chosen, restarts, data, output, show, fresh=fresh)
        console.print(colored_mnist_table(results))
        colored_mnist_figure(results, output / "figure.png")
    console.print(f"Figure: {output / 'figure.png'}\nResults: {output / 'results.json'}")


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
        list[str] | None, _several(pacs_experiment.ALGORITHMS, pacs_experiment.DEFAULT)
    ] = None,
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = pacs_experiment.STEPS,
    output: Annotated[Path, typer.Option(help="Folder for results and figure.")] = Path(
        "fastdg-pacs"
    ),
    workers: Workers = None,
    fresh: Fresh = False,
) -> None:
    """Fine-tune CIFAR-10's ResNet-20 on PACS at 32x32, each domain left out in turn.

    An hour or more on two cores. A run that was killed goes on where it was.
    """
    from ..studies.report.pacs_figure import pacs_figure

    with _said():
        if data is None:
            raise ValueError(
                "--data: expected the folder that holds pacs/ and weights/, got none. Pass it, or "
                "set FASTDG_DATA."
            )
        chosen = _names(algorithms) or pacs_experiment.DEFAULT
        plan = pacs_experiment.Plan(data, chosen, seeds, steps)
        processes = _processes(workers)
        with _training() as show:
            results = pacs_experiment.run(plan, output / "results.json", fresh, show, processes)
        console.print(pacs_table(results))
        pacs_figure(results, output / "figure.png")
    console.print(f"Figure: {output / 'figure.png'}\nResults: {output / 'results.json'}")
