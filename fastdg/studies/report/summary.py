"""Results in words: a table's rows, and the sentences after it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
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
        ratio: of ``seconds`` to ERM's; NaN without ERM.
        peak_bytes: of a step, the median over runs.
        distance: between the domains' gradient variances after the last step, one value a seed,
            the mean over the domains left out.
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
    distance: list[float]


def ordered(names: Iterable[str]) -> list[str]:
    """Plain training first, the others as they are."""
    return sorted(names, key=lambda name: name != "erm")


def rows(results: dict[str, Any], task: str) -> list[Row]:
    """Return the table of one task: ERM, then the others in the plan's order."""
    plan = results["plan"]
    shape, seeds = TASKS[task](0), range(plan["seeds"])
    anneal = SETTINGS[task].anneal_steps(results["settings"][task]["steps"])
    pairs = [(d, seed) for d in shape.tested for seed in seeds]

    def runs_of(algorithm: str) -> dict[tuple[int, int], dict[str, Any]]:
        return {(d, s): results["runs"][f"{task}/{d}/{s}/{algorithm}"] for d, s in pairs}

    def by_seed(
        runs: dict[tuple[int, int], dict[str, Any]], value: Callable[[dict[str, Any]], float]
    ) -> list[float]:
        return [statistics.fmean(value(runs[d, s]) for d in shape.tested) for s in seeds]

    def seconds(algorithm: str) -> float:
        return statistics.median(run["step_seconds"] for run in runs_of(algorithm).values())

    plain = seconds("erm") if "erm" in plan["algorithms"] else math.nan
    out: list[Row] = []
    for algorithm in ordered(plan["algorithms"]):
        runs = runs_of(algorithm)
        out.append(
            Row(
                algorithm,
                ALGORITHMS[algorithm].title,
                {
                    shape.domains[d]: mean_and_error([runs[d, s]["chosen"] for s in seeds])
                    for d in shape.tested
                },
                by_seed(runs, lambda run: run["chosen"]),
                by_seed(runs, lambda run: run["last"]),
                statistics.fmean(run["chosen_step"] <= anneal for run in runs.values()),
                seconds(algorithm),
                seconds(algorithm) / plain,
                statistics.median(run["peak_bytes"] for run in runs.values()),
                by_seed(runs, lambda run: run["curve"][-1]["distance"]),
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


def closing_words(results: dict[str, Any], task: str) -> list[str]:
    """Return sentences about the numbers, computed from them alone.

    A difference is the mean over seeds of the difference to ERM with the same seed; it is called
    clear if its 95 % interval (Student's t) leaves out 0.
    """
    table = rows(results, task)
    shape, seeds = TASKS[task](0), results["plan"]["seeds"]
    plain = next((row for row in table if row.algorithm == "erm"), None)
    others = [row for row in table if row is not plain]
    if plain is None or not others:
        return [f"{shape.name}: nothing to compare; run erm and another algorithm."]
    words = []
    if seeds < 2:
        words.append("One seed, which proves nothing.")
    else:
        words.append(
            _verdict("After the last step", [(r.title, r.last) for r in others], plain.last)
        )
        chosen = [(r.title, r.chosen) for r in others]
        words.append(_verdict("At the chosen checkpoint", chosen, plain.chosen))
        level = 100 / shape.classes
        near = [r.title for r in table if not _clear(_over(r.last, level), seeds)]
        if near:
            words.append(f"Not clearly other than guessing ({level:.0f} %): {', '.join(near)}.")
    early = statistics.fmean(row.early for row in others)
    if early > 0.5:
        words.append(
            f"In {100 * early:.0f} % of these runs the training domains' held-out parts fared best "
            "before the full penalty, so the chosen checkpoint hardly shows it."
        )
    words.append(f"Settings: {SETTINGS[task].source}.")
    return [f"{shape.name}, against ERM:", *words]


def _over(values: Sequence[float], level: float) -> Estimate:
    return mean_and_error([value - level for value in values])


def _verdict(
    when: str, others: Sequence[tuple[str, Sequence[float]]], plain: Sequence[float]
) -> str:
    """Who is clearly better than plain training, who worse."""
    found: dict[str, list[str]] = {"better": [], "worse": []}
    for title, values in others:
        (gain, _), clear = difference(values, plain)
        if clear:
            found["better" if gain > 0 else "worse"].append(title)
    said = [f"{', '.join(names)} clearly {kind}" for kind, names in found.items() if names]
    return f"{when}: {'; '.join(said) or 'no clear difference'}."
