"""The package's algorithms for the terminal."""

from __future__ import annotations

import inspect

from rich.table import Table
from rich.text import Text

from ..studies.catalogue import ALGORITHMS, COSTS, FAMILIES
from ..studies.experiments.settings import ALGORITHMS as COMPARED


def algorithms_table(family: str) -> Table:
    """Return the algorithms of a family: name, class, cost, the gradient of a step, and paper."""
    table = Table(title=f"{family}: {FAMILIES[family]}", title_justify="left", title_style="bold")
    for name, width in (("name", 11), ("fastdg.", 11), ("cost", 10)):
        table.add_column(name, min_width=width, no_wrap=True)
    table.add_column("a step goes along", ratio=1)
    table.expand = True
    for name, entry in ALGORITHMS.items():
        if entry.family == family:
            words = Text.assemble(entry.sentence, "\n", (entry.paper, "dim"))
            table.add_row(name, entry.wrapper.__name__, entry.cost, words)
    return table


def costs_table() -> Table:
    """Return what the costs mean."""
    table = Table(title="cost of a step", title_justify="left", show_header=False, box=None)
    for name, words in COSTS.items():
        table.add_row(name, words)
    table.caption = "More about one: fastdg list NAME"
    table.caption_justify = "left"
    return table


def described(name: str) -> str:
    """Return all that is known about an algorithm, in lines."""
    entry = ALGORITHMS[name]
    arguments = inspect.signature(entry.wrapper).parameters.values()
    said = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in arguments)
    demo = [each for each, found in COMPARED.items() if found.wrapper is entry.wrapper]
    lines = {
        "step": f"goes along {entry.sentence}",
        "cost": f"{entry.cost}: {COSTS[entry.cost]}",
        "class": f"fastdg.{entry.wrapper.__name__}({', '.join(said)})",
        "paper": entry.papers,
    }
    if name == "erm" or demo:
        lines["demo"] = f"fastdg demo --algorithms {','.join(dict.fromkeys(['erm', *demo]))}"
    return "\n".join([entry.title, *(f"  {key}: {words}" for key, words in lines.items())])
