"""Results as tables for the terminal."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from .. import backends
from ..ops.dispatch.registry import BACKENDS, OPS
from ..studies.catalogue import ALGORITHMS as CATALOGUE
from ..studies.data.pacs import DOMAINS
from ..studies.experiments.pacs import ALGORITHMS
from ..studies.report.pacs_figure import MEAN, accuracies, gain
from ..studies.report.summary import mean_and_error, ordered
from .demo_tables import value

ROUTE = """\
A call goes to the first backend that is here, has the op and takes the arguments: cpp on the CPU,
cuda and then triton on CUDA. The reference takes all others. cpp and cuda take float32; triton
takes float32, bfloat16 and float16. To log why a backend passes a call on:

    logging.basicConfig()
    logging.getLogger("fastdg.ops").setLevel("DEBUG")"""


def ops_table() -> Table:
    """Return the backends that compute each op."""
    table = Table(title="ops", title_justify="left")
    names = [name for name in BACKENDS if name != "reference"]
    here = {name: available for name, (available, _) in backends().items()}
    for name in ("op", *names):
        table.add_column(name)
    for name, op in sorted(OPS.items()):
        cells = ("[green]yes[/]" if b in op.backends and here[b] else "no" for b in names)
        table.add_row(name, *cells)
    return table


def colored_mnist_table(results: dict[str, Any]) -> Table:
    """Final accuracies beside the paper's."""
    title = "ColoredMNIST: final accuracy (%), mean ± standard deviation"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("algorithm", "on", "here", "paper", "reproduced", "s/step"):
        table.add_column(name)
    for name in ordered(results["algorithms"]):
        entry = results["algorithms"][name]
        restarts = entry["restarts"]
        seconds = sum(restart["seconds_per_step"] for restart in restarts) / len(restarts)
        for key, found in entry["summary"].items():
            mean, std = found["paper"]
            within = "[green]yes[/]" if found["within"] else "[red]no[/]"
            table.add_row(
                f"{CATALOGUE[name].title}, {len(restarts)} seeds" if key == "train" else "",
                key,
                f"{found['mean']:.1f} ± {found['std']:.1f}",
                f"{mean:.1f} ± {std:.1f}",
                f"{within} (within {found['tolerance']:.1f})",
                f"{seconds:.2f}" if key == "train" else "",
            )
    return table


def pacs_table(results: dict[str, Any]) -> Table:
    """Accuracy on each domain left out; a column an algorithm."""
    names, seeds = ordered(results["plan"]["algorithms"]), results["plan"]["seeds"]
    title = "PACS, 32x32: accuracy (%) on the domain left out"
    if seeds > 1:
        title += f"\nmean ± standard error of {seeds} seeds"
    table = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    table.caption = (
        "checkpoint: chosen on the training domains, or the last; gain: of the mean over ERM's "
        "with the same seed, * if its 95 % interval leaves out 0"
    )
    table.add_column("")
    for name in names:
        table.add_column(ALGORITHMS[name][0], justify="right")
    chosen = {name: accuracies(results, name, "chosen") for name in names}
    for group in (*DOMAINS, MEAN):
        if group == MEAN:
            table.add_section()
        table.add_row(group, *(value(mean_and_error(chosen[name][group])) for name in names))
    gains = [gain(results, name, "chosen") if name != "erm" else None for name in names]
    said = ["" if g is None else f"{g[0][0]:+.1f} ± {g[0][1]:.1f}{'*' * g[1]}" for g in gains]
    table.add_row("gain", *said)
    last = [accuracies(results, name, "last")[MEAN] for name in names]
    table.add_row("mean, last step", *map(value, map(mean_and_error, last)))
    table.add_section()
    seconds = [
        statistics.median(
            run["step_seconds"] for key, run in results["runs"].items() if key.endswith(f"/{name}")
        )
        for name in names
    ]
    table.add_row("time per step (ms)", *(f"{1e3 * each:.0f}" for each in seconds))
    return table
