"""Options that several commands have, and errors in a line: one spelling everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..studies.catalogue import resolved
from ..studies.experiments.units import cores

console = Console(width=None if sys.stdout.isatty() else 110)
SPELLED = {"output": "out", "restarts": "seeds"}  # options of earlier versions, which still work
# For every command: context_settings=CONTEXT
CONTEXT: dict[str, Any] = {"token_normalize_func": lambda name: SPELLED.get(name, name)}

Out = Annotated[Path, typer.Option("--out", help="Folder for results and figures.")]
Seeds = Annotated[int, typer.Option("--seeds", help="Runs of each, seeds 0, 1, ...: 1 or more.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Runs side by side, each on one core: 1 or more.", show_default="every core"),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Ignore earlier results.")]


def several(known: Sequence[str], default: Sequence[str] = ()) -> Any:
    """Return the option for some of the known names, ``default`` or all by default."""
    some = f"Some of {', '.join(known)}." if len(known) < 10 else "See fastdg list."
    return typer.Option(
        help=f"{some} Case and hyphens do not count.",
        metavar="NAME,NAME",
        show_default=", ".join(default) or "all",
    )


def steps_option(least: int, default: str | bool = True) -> Any:
    """Return the option for the steps of a run."""
    words = f"Optimizer steps of a run: {least} or more."
    return typer.Option("--steps", help=words, show_default=default)


def names(given: list[str] | None, known: Sequence[str], default: Sequence[str] = ()) -> Any:
    """``--algorithms erm,fishr`` or ``--algorithms erm --algorithms fishr``; each once, as
    ``known`` spells it. ``default``, or all, for none."""
    asked = [name.strip() for text in given or () for name in text.split(",")]
    return resolved(asked, known) if given else tuple(default or known)


def processes(workers: int | None) -> int:
    """Return how many runs go side by side.

    Raises:
        ValueError: fewer than one.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected >= 1, got {workers}. Pass a larger number.")
    return workers or cores()


@contextmanager
def errors() -> Iterator[None]:
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
def training() -> Iterator[Callable[[str, int, int], None]]:
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
