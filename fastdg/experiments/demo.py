"""The demo: every algorithm on every task and seed, resumable, and what the numbers say."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.digits import TASKS, Task
from .machine import machine
from .storage import write_json
from .training import ALGORITHMS, train


@dataclass(frozen=True)
class Plan:
    """What a demo runs. ``key`` of a unit is ``task/domain left out/seed/algorithm``."""

    algorithms: tuple[str, ...] = tuple(ALGORITHMS)
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = 3
    steps: int = 300

    def __post_init__(self) -> None:
        for what, names, known in (
            ("algorithms", self.algorithms, ALGORITHMS),
            ("datasets", self.tasks, TASKS),
        ):
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise ValueError(
                    f"{what}: expected some of {', '.join(known)}, got {unknown or 'none'}"
                )
        if self.seeds < 1 or self.steps < 1:
            raise ValueError(f"seeds, steps: expected >= 1, got {self.seeds} and {self.steps}")

    def units(self) -> Iterator[tuple[str, str, int, int, str]]:
        """``(key, task, left out, seed, algorithm)``; algorithms in turn, so that their times are
        comparable."""
        for task in self.tasks:
            for seed in range(self.seeds):
                for left_out in TASKS[task](seed).tested:
                    for algorithm in self.algorithms:
                        key = f"{task}/{left_out}/{seed}/{algorithm}"
                        yield key, task, left_out, seed, algorithm


def run(
    plan: Plan,
    path: Path,
    fresh: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Run what ``path`` does not hold yet, writing it after every unit.

    A run killed at any moment goes on where it was: units are deterministic, and the file is
    replaced whole.

    Args:
        plan: what to run.
        path: of the results, JSON: ``plan``, ``machine`` and ``runs`` (key -> the result of
            `training.train`).
        fresh: ignore what is there.
        progress: told the unit's key, how many are done, and how many there are.

    Raises:
        ValueError: ``path`` holds results of another number of steps, or is not a result file.
    """
    results: dict[str, Any] = {"runs": {}}
    if path.exists() and not fresh:
        try:
            results = json.loads(path.read_text())
            steps = results["plan"]["steps"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not a result file of the demo; remove it or use --fresh"
            ) from error
        if steps != plan.steps:
            raise ValueError(
                f"{path}: holds runs of {steps} steps, now {plan.steps} are asked for; use "
                f"--fresh to start "
                "anew, or another --output"
            )
    results["plan"], results["machine"] = asdict(plan), machine()
    units = list(plan.units())
    made: dict[tuple[str, int], Task] = {}
    for done, (key, task, left_out, seed, algorithm) in enumerate(units):
        if progress:
            progress(key, done, len(units))
        if key not in results["runs"]:
            if (task, seed) not in made:
                made[task, seed] = TASKS[task](seed)
            result = train(made[task, seed], algorithm, left_out, seed, plan.steps)
            results["runs"][key] = result
            write_json(results, path)
    if progress:
        progress("", len(units), len(units))
    write_json(results, path)
    return results


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is NaN."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Row:
    """One algorithm on one task."""

    algorithm: str
    title: str
    accuracy: dict[str, tuple[float, float]]  # of each domain left out, over seeds
    mean: tuple[float, float]  # over those domains, over seeds
    step_seconds: float
    ratio: float  # to ERM's step
    peak_bytes: float | None


def rows(results: dict[str, Any], task: str) -> list[Row]:
    """The table of one task, in the plan's order."""
    plan = results["plan"]
    shape, seeds = TASKS[task](0), range(plan["seeds"])
    out: list[Row] = []
    plain: float | None = None
    for algorithm in plan["algorithms"]:
        runs = {
            (left_out, seed): results["runs"][f"{task}/{left_out}/{seed}/{algorithm}"]
            for left_out in shape.tested
            for seed in seeds
        }
        by_domain = {
            shape.domains[d]: mean_and_error([runs[d, seed]["accuracy"] for seed in seeds])
            for d in shape.tested
        }
        by_seed = [
            statistics.fmean(runs[d, seed]["accuracy"] for d in shape.tested) for seed in seeds
        ]
        seconds = statistics.median(r["step_seconds"] for r in runs.values())
        plain = seconds if algorithm == "erm" else plain
        peaks = [r["peak_bytes"] for r in runs.values() if r["peak_bytes"] is not None]
        out.append(
            Row(
                algorithm,
                ALGORITHMS[algorithm].title,
                by_domain,
                mean_and_error(by_seed),
                seconds,
                seconds / plain if plain else math.nan,
                statistics.median(peaks) if peaks else None,
            )
        )
    return out


def closing_words(results: dict[str, Any], task: str) -> str:
    """What the numbers show, from the numbers: a difference below two standard errors is called
    none."""
    table = rows(results, task)
    shape = TASKS[task](0)
    plain = next((row for row in table if row.algorithm == "erm"), None)
    if plain is None or len(table) < 2:
        return f"On {shape.name} there is nothing to compare with: run ERM and another algorithm."
    words = []
    for row in table:
        if row is plain:
            continue
        gain = row.mean[0] - plain.mean[0]
        error = math.hypot(row.mean[1], plain.mean[1])
        if math.isnan(error):
            verdict = f"{gain:+.1f} points against ERM, from one seed, which proves nothing"
        elif abs(gain) < 2 * error:
            verdict = f"no clear difference to ERM ({gain:+.1f} ± {error:.1f} points)"
        else:
            side = "better" if gain > 0 else "worse"
            verdict = f"{side} than ERM by {abs(gain):.1f} ± {error:.1f} points"
        words.append(f"{row.title}: {verdict}, at {row.ratio:.2f} times its step.")
    what = "accuracy on the domain left out, of the checkpoint chosen without it"
    return f"On {shape.name} ({what}): " + " ".join(words)
