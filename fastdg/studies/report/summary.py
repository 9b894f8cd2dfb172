"""Results in words: a table's rows, and the sentences after it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.digits import TASKS
from ..experiments.settings import ALGORITHMS, SETTINGS

Estimate = tuple[float, float]  # mean and standard error


def mean_and_error(values: Sequence[float]) -> Estimate:
    """Mean and standard error; the error of a single value is NaN."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Row:
    """One algorithm on one task; accuracies in per cent on the domain left out.

    Attributes:
        domains: of the chosen checkpoint, on each domain left out, over seeds.
        chosen: one value a seed, the mean over the domains left out; of the chosen checkpoint.
        last: the same after the last step.
        early: share of the runs whose chosen checkpoint lies before the full penalty.
        seconds: of a step, the median over runs of their medians.
        ratio: to ERM's step, the median over pairs of runs that followed each other.
        peak_bytes: of a step, the median over runs.
    """

    algorithm: str
    title: str
    domains: dict[str, Estimate]
    chosen: list[float]
    last: list[float]
    early: float
    seconds: float
    ratio: float
    peak_bytes: float


def rows(results: dict[str, Any], task: str) -> list[Row]:
    """Return the table of one task, in the plan's order."""
    plan = results["plan"]
    shape, seeds = TASKS[task](0), range(plan["seeds"])
    anneal = SETTINGS[task].anneal_steps(results["settings"][task]["steps"])
    pairs = [(d, seed) for d in shape.tested for seed in seeds]

    def runs_of(algorithm: str) -> dict[tuple[int, int], dict[str, Any]]:
        return {(d, s): results["runs"][f"{task}/{d}/{s}/{algorithm}"] for d, s in pairs}

    def by_seed(runs: dict[tuple[int, int], dict[str, Any]], key: str) -> list[float]:
        return [statistics.fmean(runs[d, s][key] for d in shape.tested) for s in seeds]

    plain = runs_of("erm") if "erm" in plan["algorithms"] else None
    out: list[Row] = []
    for algorithm in plan["algorithms"]:
        runs = runs_of(algorithm)
        seconds = {pair: run["step_seconds"] for pair, run in runs.items()}
        ratio = math.nan
        if plain is not None:
            ratio = statistics.median(seconds[p] / plain[p]["step_seconds"] for p in pairs)
        out.append(
            Row(
                algorithm,
                ALGORITHMS[algorithm].title,
                {
                    shape.domains[d]: mean_and_error([runs[d, s]["chosen"] for s in seeds])
                    for d in shape.tested
                },
                by_seed(runs, "chosen"),
                by_seed(runs, "last"),
                statistics.fmean(run["chosen_step"] <= anneal for run in runs.values()),
                statistics.median(seconds.values()),
                ratio,
                statistics.median(run["peak_bytes"] for run in runs.values()),
            )
        )
    return out


# Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def _clear(difference: Estimate, count: int) -> bool:
    """Return whether the 95 % interval of a mean of ``count`` values leaves out 0."""
    mean, error = difference
    return abs(mean) > STUDENT[min(count - 1, len(STUDENT)) - 1] * error


def difference(row: Sequence[float], plain: Sequence[float]) -> tuple[Estimate, bool]:
    """Mean and standard error of the difference, seed by seed, and whether it is clear: its 95 %
    interval (Student's t) leaves out 0."""
    found = mean_and_error([a - b for a, b in zip(row, plain, strict=True)])
    return found, _clear(found, len(row))


def _against(row: list[float], plain: list[float], chance: float) -> str:
    values = f"{statistics.fmean(row):.1f} against {statistics.fmean(plain):.1f} %"
    if len(row) < 2:
        return f"{values}, of one seed, which proves nothing"
    (gain, error), clear = difference(row, plain)
    verdict = "no clear difference"
    if clear:
        verdict = "better" if gain > 0 else "worse"
    if not _clear(mean_and_error([value - chance for value in row]), len(row)):
        verdict += f"; not clearly other than guessing, {chance:.0f} %"
    return f"{values} ({gain:+.1f} ± {error:.1f}: {verdict})"


def closing_words(results: dict[str, Any], task: str) -> list[str]:
    """Return sentences about the numbers, computed from them alone.

    A difference is the mean over seeds of the difference to ERM with the same seed, ± its standard
    error; it is called clear if its 95 % interval (Student's t) leaves out 0.
    """
    table = rows(results, task)
    shape = TASKS[task](0)
    plain = next((row for row in table if row.algorithm == "erm"), None)
    others = [row for row in table if row is not plain]
    if plain is None or not others:
        return [f"{shape.name}: nothing to compare; run erm and another algorithm."]
    chance = 100 / shape.classes
    words = [f"{shape.name}, against ERM on the domain left out:"]
    words += [
        f"{row.title}: chosen checkpoint {_against(row.chosen, plain.chosen, chance)}; "
        f"last step {_against(row.last, plain.last, chance)}."
        for row in others
    ]
    early = statistics.fmean(row.early for row in others)
    if early > 0.5:
        words.append(
            f"In {100 * early:.0f} % of these runs the training domains' held-out parts fared best "
            "before the full penalty, so the chosen checkpoint hardly shows it."
        )
    if shape.best is not None:
        words.append(f"Ignoring the misleading cue gives at most {shape.best:.0f} %.")
    words.append(f"Penalty: {SETTINGS[task].source}.")
    return words
