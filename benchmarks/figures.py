"""Pictures of the measured times: one a question, each case a row, all rows on one axis."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOOR = "copy of the same bytes"
# Rows that are not another library: drawn and compared apart.
OWN = ("plain", "fastdg", "fastdg, reference backend", "fastdg, before the anneal", FLOOR)
SOURCE = "fastdg results"  # the key under which a picture names the results that it is drawn of
OURS, PEER, REST, BOUND = "#0072b2", "#d55e00", "#b0b0b0", "#009e73"


def peers(case: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Contenders that were measured, other than ours; the fastest first."""
    rows = {n: r for n, r in case["contenders"].items() if n not in OWN and "ratio" in r}
    return dict(sorted(rows.items(), key=lambda item: item[1]["ratio"]))


def times(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio < 9.95 else f"{ratio:.0f}×"


@dataclass(frozen=True)
class Picture:
    """A question.

    Attributes:
        title: the question.
        axis: what the times are multiples of, and what the floor is.
        groups: a case's question in the results -> its heading here.
        unit: the contender that is 1, where it was measured; else plain training.
    """

    title: str
    axis: str
    groups: Mapping[str, str]
    unit: str = "plain"


PLAIN = "time over plain training's; floor: operations"
PICTURES = {
    "statistics": Picture(
        "What do the domains' gradient variances cost?",
        PLAIN,
        {
            "variance": "variances, all layers",
            "differentiable": "the same as a penalty, with its gradient",
            "head": "Fishr's penalty on the head",
        },
    ),
    "steps": Picture(
        "What does a whole training step cost?",
        PLAIN,
        {
            "step": "Fishr (head)",
            "Agr-Sum, D=3": "Agr-Sum, 3 domains",
            "Agr-Sum, D=6": "Agr-Sum, 6 domains",
            "AND-mask, D=3": "AND-mask, 3 domains",
            "PCGrad, D=3": "PCGrad, 3 domains",
            "PCGrad, D=6": "PCGrad, 6 domains",
            "compiled Fishr, all layers": "Fishr (all layers), compiled",
            "compiled Fishr (head)": "Fishr (head), compiled",
            "compiled Agr-Sum, D=3": "Agr-Sum, 3 domains, compiled",
        },
    ),
    "given": Picture(
        "What does it cost to combine gradients that are there?",
        "time over a copy's, the floor (Fish: over its steps')",
        {
            "agreement": "agreement of signs",
            "gram": "Gram matrix",
            "PCGrad of given gradients": "PCGrad",
            "meta_step": "Fish's meta step",
            "Fish": "Fish's meta-iteration",
        },
        unit=FLOOR,
    ),
}


@dataclass(frozen=True)
class Row:
    """A case: multiples of the unit's time."""

    title: str
    ours: float
    floor: float | None
    peers: dict[str, float]  # the fastest first

    @property
    def best(self) -> str:
        """Return the fastest other way in words."""
        return next((f"{times(ratio)} {name}" for name, ratio in self.peers.items()), "–")


def rows(results: Mapping[str, Any], picture: Picture) -> dict[str, list[Row]]:
    """Heading -> its cases."""
    found: dict[str, list[Row]] = {}
    for question, heading in picture.groups.items():
        for case in results["cases"].values():
            if case["question"] != question:
                continue
            contenders = case["contenders"]
            unit = contenders.get(picture.unit, contenders["plain"])["median"]
            plain = picture.unit == "plain"
            # As the tables do: over plain training by the rounds' ratios, over a copy by medians
            over: Callable[[Any], float] = (
                (lambda row: row["ratio"]) if plain else (lambda row, u=unit: row["median"] / u)
            )
            floor = case["floor"] if plain else (1.0 if FLOOR in contenders else None)
            others = {name: over(row) for name, row in peers(case).items()}
            found.setdefault(heading, []).append(
                Row(case["title"], over(contenders["fastdg"]), floor, others)
            )
    return found


# Of the width: where the axis begins and ends, and the two columns of numbers begin
LEFT, RIGHT, FIRST, SECOND = 0.31, 0.59, 0.6, 0.66
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4)
FAR = (1, 3, 10, 30, 100, 300)  # where they go farther


def draw(results: Mapping[str, Any], picture: Picture, path: Path) -> None:
    """Every contender's time as a point; ours and the fastest other way in words."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from fastdg.figure_style import PAGE, STYLE, save

    lines: list[tuple[str, Row | None]] = []
    for heading, group in rows(results, picture).items():
        lines += [(heading, None), *((row.title, row) for row in group)]
    above, below, line = 0.62, 0.42, 0.165  # inches
    height = above + below + line * len(lines)
    with rc_context({**STYLE, "xtick.labelsize": 7, "axes.labelsize": 7, "legend.fontsize": 7}):
        figure = Figure(figsize=(PAGE, height))
        axes = figure.add_axes((LEFT, below / height, RIGHT - LEFT, line * len(lines) / height))
        axes.axvline(1, color="black", lw=0.8, zorder=0)
        written = {
            "xycoords": ("figure fraction", "data"),
            "va": "center",
            "fontsize": 7,
            "annotation_clip": False,
        }
        for at, (words, row) in enumerate(lines):
            if row is None:
                axes.annotate(words, (0.008, at), fontweight="bold", **written)
                continue
            axes.annotate(words, (0.02, at), **written)
            if row.floor is not None:
                axes.plot(row.floor, at, "|", ms=9, mew=1.4, color=BOUND)
            best, *rest = [*row.peers.values()] or [None]
            axes.plot(rest, [at] * len(rest), "o", ms=3, color=REST)
            if best is not None:
                axes.plot(best, at, "s", ms=4, color=PEER)
            axes.plot(row.ours, at, "o", ms=5, color=OURS)
            axes.annotate(times(row.ours), (FIRST, at), color=OURS, fontweight="bold", **written)
            axes.annotate(_short(row.best), (SECOND, at), color=PEER, **written)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [tick for tick in (TICKS if high < 10 else FAR) if low <= tick <= high]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(picture.axis)
        figure.text(0.008, 1 - 0.16 / height, picture.title, fontsize=9, va="center")
        marks = [("o", OURS, "fastdg"), ("s", PEER, "best other way"), ("o", REST, "others")]
        marks.append(("|", BOUND, "floor"))
        handles = [
            Line2D([], [], ls="", marker=m, ms=5, color=c, label=label) for m, c, label in marks
        ]
        place = (LEFT, 1 - 0.58 / height)
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=place, ncols=4)
        save(figure, path)


def _short(name: str) -> str:
    return name.replace("torch.func ", "").replace(" (DomainBed, repaired)", ", repaired")


def digest(source: Path) -> str:
    """Return a digest of a result file's contents, whatever its layout."""
    return hashlib.sha256(json.dumps(json.loads(source.read_text())).encode()).hexdigest()


def stamp(path: Path, source: Path) -> None:
    """Write into a picture which results it is drawn of."""
    from PIL import Image, PngImagePlugin

    words = PngImagePlugin.PngInfo()
    words.add_text(SOURCE, digest(source))
    with Image.open(path) as image:
        image.load()
        image.save(path, pnginfo=words, dpi=image.info.get("dpi"))


def draw_all(folder: Path) -> None:
    """Draw the pictures of all committed results in ``folder``."""
    from render_training import with_plan

    from fastdg.studies.report.colored_mnist_figure import colored_mnist_figure
    from fastdg.studies.report.pacs_figure import pacs_figure

    cpu, mnist, pacs = (folder / f"{name}.json" for name in ("cpu", "colored_mnist", "pacs"))
    results = json.loads(cpu.read_text())
    for name, picture in PICTURES.items():
        path = folder / f"cpu_{name}.png"
        draw(results, picture, path)
        stamp(path, cpu)
    colored_mnist_figure(json.loads(mnist.read_text()), mnist.with_suffix(".png"))
    stamp(mnist.with_suffix(".png"), mnist)
    pacs_figure(with_plan(json.loads(pacs.read_text())), pacs.with_suffix(".png"))
    stamp(pacs.with_suffix(".png"), pacs)
