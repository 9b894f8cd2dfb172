"""The benchmark: every algorithm on every data set, domain left out and seed; resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..experiments.settings import EVALUATIONS
from ..experiments.units import Told, check_names, run_units, silent
from .algorithms import CONTENDERS, DIGITS, WEIGHT, WIDTH
from .datasets import DATASETS, fingerprint, missing
from .folds import FIT, ROWS
from .training import FIELDS, search

STEPS, TRIALS, SEEDS = 60, 3, 5


@dataclass(frozen=True)
class Plan:
    """The plan of a benchmark.

    Attributes:
        data: folder of the data sets; data sets that are not there are left out, see `skipped`.
        seeds: repetitions, with seeds 0, 1, ...
        trials: settings that are searched, the defaults first.
        steps: of a run.
    """

    data: Path | None
    datasets: tuple[str, ...] = tuple(DATASETS)
    algorithms: tuple[str, ...] = tuple(CONTENDERS)
    seeds: int = SEEDS
    trials: int = TRIALS
    steps: int = STEPS

    def __post_init__(self) -> None:
        check_names("datasets", self.datasets, tuple(DATASETS))
        check_names("algorithms", self.algorithms, tuple(CONTENDERS))
        for name, least in (("seeds", 1), ("trials", 1), ("steps", EVALUATIONS)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}: expected >= {least}, got {value}. Pass a larger number.")
        if not self.present():
            raise ValueError(
                f"datasets: none is here ({'; '.join(self.skipped())}). Set FASTDG_DATA or pass "
                "--data, or add digits, which comes with scikit-learn."
            )

    def skipped(self) -> list[str]:
        """Return in words which data sets are not there."""
        words = (missing(name, self.data) for name in self.datasets)
        return [said for said in words if said is not None]

    def present(self) -> tuple[str, ...]:
        """Return the data sets that are there."""
        return tuple(name for name in self.datasets if missing(name, self.data) is None)

    def settings(self) -> dict[str, Any]:
        """Return the settings that results depend on."""
        return {
            "steps": self.steps,
            "trials": self.trials,
            "evaluations": EVALUATIONS,
            "width": WIDTH,
            "rows": ROWS,
            "fit": FIT,
            "digits": DIGITS,
            "weight": WEIGHT,
        }

    def units(self) -> Iterator[tuple[str, str, int, str, int]]:
        """``(key, data set, left out, algorithm, seed)``: one data set after the other, algorithms
        in turn. The key is ``data set/left out/algorithm/seed``."""
        for name in self.present():
            for seed in range(self.seeds):
                for left_out in range(len(DATASETS[name].domains)):
                    for algorithm in self.algorithms:
                        key = f"{name}/{left_out}/{algorithm}/{seed}"
                        yield key, name, left_out, algorithm, seed


def run(
    plan: Plan, path: Path, fresh: bool = False, progress: Told = silent, workers: int = 1
) -> dict[str, Any]:
    """Run the units that ``path`` does not hold yet; see `units.run_units`. A unit's result is
    `training.search`'s."""
    units: Mapping[str, Any] = {
        key: partial(search, plan.data, name, left_out, algorithm, seed, plan.trials, plan.steps)
        for key, name, left_out, algorithm, seed in plan.units()
    }
    data = {name: fingerprint(name, plan.data) for name in plan.present()}
    return run_units(units, plan.settings(), path, fresh, progress, workers, FIELDS, data)
