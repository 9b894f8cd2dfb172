"""Options that several commands have, and errors in a line: one spelling everywhere."""

from __future__ import annotations

import sys
import time
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
        said = Text.assemble(("fastdg: ", "red"), words)
        Console(stderr=True).print(said, soft_wrap=True)
        raise typer.Exit(2) from error


def duration(seconds: float) -> str:
    """Return a duration in words."""
    minutes = max(1, round(seconds / 60))
    if seconds < 50:
        return "less than a minute"
    if minutes < 100:
        return f"about {minutes} minute{'s' * (minutes > 1)}"
    return f"about {minutes / 60:.0f} hours"


@contextmanager
def training(
    what: str, seconds: float | None = None, note: str = ""
) -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress, as a bar or, in a file or pipe, in lines.

    Args:
        what: is counted, in the plural.
        seconds: all of it takes, about; told at the start.
        note: told at the start, too.

    Yields:
        A function that takes the name of the one that runs, the number done, and the total.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )

    def _plan(done: int, total: int) -> str:
        words = f"{total} {what}"
        if done:
            words += f", {done} of them done before"
        if seconds is not None and done < total:
            words += f": {duration(seconds * (total - done) / total)}, if nothing else runs"
        return words

    began, start = 0.0, -1

    def lines(done: int, total: int) -> None:
        """Tell of the first, of each tenth, and how long the others take by what these took."""
        nonlocal began
        if done == start + 1:
            began = time.monotonic()  # before it the processes started
            console.print(f"{done} of {total} {what} done", highlight=False)
        elif done * 10 // total > (done - 1) * 10 // total:
            left = (total - done) * (time.monotonic() - began) / (done - start - 1)
            more = f", {duration(left)} left" if done < total else ""
            console.print(f"{done} of {total} {what} done{more}", highlight=False)

    try:
        with Progress(*columns, console=console) as bars:
            bar = bars.add_task("training", total=None, visible=False)  # none beside an error

            def show(name: str, done: int, total: int) -> None:
                nonlocal start
                if start < 0:
                    start = done
                    console.print(f"{_plan(done, total)}{note}", highlight=False)
                bars.update(
                    bar, description=name or "done", completed=done, total=total, visible=True
                )
                if done > start and not console.is_terminal:
                    lines(done, total)

            yield show
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130) from None
