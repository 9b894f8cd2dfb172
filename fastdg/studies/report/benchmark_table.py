"""The benchmark's standings as rows of text, for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..benchmark.datasets import DATASETS
from .benchmark_summary import ERM, Standing, standings, words
from .summary import Estimate

Table = tuple[list[str], list[list[str]]]  # header, and rows
CAPTION = (
    "gain: over ERM with the same seed, domain and data set, * if its 95 % interval over seeds "
    "leaves out 0. above ERM: on how many of the domains left out. rank: among all. oracle: where "
    "the domain left out chooses. cost: processor time of a step over ERM's. defaults: how often "
    "the default setting was chosen"
)


def accuracies(summary: Mapping[str, Any]) -> Table:
    """Accuracy on each data set, and their average."""
    header = ["", *(DATASETS[name].title for name in summary["datasets"]), "average"]
    rows = [
        [s.title, *(_estimate(value) for value in (*s.accuracy.values(), s.average))]
        for s in standings(summary)
    ]
    return header, rows


def comparison(summary: Mapping[str, Any]) -> Table:
    """What each algorithm gains over ERM, and what it costs."""
    header = ["", "gain", "above ERM", "rank", "oracle", "cost", "defaults"]
    return header, [_compared(s) for s in standings(summary)]


def _compared(s: Standing) -> list[str]:
    (gain, error), clear = s.gain
    said = f"{gain:+.1f}" if math.isnan(error) else f"{gain:+.1f} ± {error:.1f}{'*' * clear}"
    plain = s.algorithm == ERM
    return [
        s.title,
        "" if plain else said,
        "" if plain else f"{s.better} of {s.better + s.worse}",
        _estimate(s.rank),
        _estimate(s.oracle),
        f"{s.cost:.1f}",
        f"{100 * s.defaults:.0f} %",
    ]


def _estimate(estimate: Estimate) -> str:
    mean, error = estimate
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def title(summary: Mapping[str, Any]) -> str:
    """Return what the numbers are."""
    settings, seeds = summary["settings"], summary["seeds"]
    error = f", mean ± standard error of {seeds} seeds" if seeds > 1 else ""
    return (
        f"Accuracy (%) on the domain left out{error}; {settings['trials']} settings searched, "
        f"{settings['steps']} steps"
    )


def markdown(summary: Mapping[str, Any]) -> str:
    """Return the sentences and both tables in one."""
    (head, left), (more, right) = accuracies(summary), comparison(summary)
    lines = [head + more[1:], ["---"] + ["---:"] * (len(head) + len(more) - 2)]
    lines += [a + b[1:] for a, b in zip(left, right, strict=True)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    said = "\n".join(f"- {sentence}" for sentence in words(summary))
    made = ", ".join(f"{name} {digest}" for name, digest in summary.get("data", {}).items())
    made = f"\nFingerprints of the data: {made}.\n" if made else ""
    return f"{said}\n\n{title(summary)}.\n\n{table}\n\n{CAPTION}.\n{made}"
