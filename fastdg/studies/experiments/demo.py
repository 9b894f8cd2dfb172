"""The demo: every algorithm on every task, domain left out and seed; resumable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..data.digits import TASKS, Task, fingerprint
from .settings import ALGORITHMS, DEFAULT, SETTINGS
from .training import FIELDS, train
from .units import Told, check_names, run_units, silent

SECONDS = {"coloured": 4.0, "rotated": 1.5}  # of a run with the task's own steps on one core, about
LEAST = 3  # steps of a run: one before the penalty, one to time, one whose memory is measured


@dataclass(frozen=True)
class Plan:
    """The plan of a demo; each task has ``steps`` of its own by default."""

    algorithms: tuple[str, ...] = DEFAULT
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = 3
    steps: int | None = None

    def __post_init__(self) -> None:
        check_names("algorithms", self.algorithms, tuple(ALGORITHMS))
        check_names("datasets", self.tasks, tuple(TASKS))
        if self.seeds < 1:
            raise ValueError(f"seeds: expected >= 1, got {self.seeds}. Pass a larger number.")
        if self.steps is not None and self.steps < LEAST:
            raise ValueError(f"steps: expected >= {LEAST}, got {self.steps}. Pass a larger number.")

    def steps_of(self, task: str) -> int:
        return SETTINGS[task].steps if self.steps is None else self.steps

    def seconds(self) -> float:
        """Return how long all runs take one after the other, about."""
        # Evaluations, as many whatever the steps, are some third of it
        shares = {task: (1 + 2 * self.steps_of(task) / SETTINGS[task].steps) / 3 for task in TASKS}
        return sum(SECONDS[task] * shares[task] for _, task, *_ in self.units())

    def units(self) -> Iterator[tuple[str, str, int, int, str]]:
        """``(key, task, left out, seed, algorithm)``; algorithms in turn, so that their times are
        comparable. The key is ``task/left out/seed/algorithm``."""
        for task in self.tasks:
            for seed in range(self.seeds):
                for left_out in TASKS[task](seed).tested:
                    for algorithm in self.algorithms:
                        key = f"{task}/{left_out}/{seed}/{algorithm}"
                        yield key, task, left_out, seed, algorithm


_task = cache(lambda name, seed: TASKS[name](seed))


def _train(name: str, left_out: int, seed: int, algorithm: str, steps: int) -> dict[str, Any]:
    task: Task = _task(name, seed)
    return train(task, SETTINGS[name], algorithm, left_out, seed, steps)


def run(
    plan: Plan, path: Path, fresh: bool = False, progress: Told = silent, workers: int = 1
) -> dict[str, Any]:
    """Run the units that ``path`` does not hold yet; see `units.run_units`.

    Returns:
        The plan's part of the file: ``settings``, the `Setting.identity` of each task;
        ``machine``; ``runs``, the results of `training.train`; and ``plan`` itself:
        ``algorithms``, ``tasks`` and ``seeds``.
    """
    settings = {name: SETTINGS[name].identity(plan.steps_of(name)) for name in TASKS}
    units = {
        key: partial(_train, name, left_out, seed, algorithm, plan.steps_of(name))
        for key, name, left_out, seed, algorithm in plan.units()
    }
    asked = {"algorithms": plan.algorithms, "tasks": plan.tasks, "seeds": plan.seeds}
    data = {"digits": fingerprint()}
    results = run_units(units, settings, path, fresh, progress, workers, FIELDS, data)
    return results | {"plan": asked}
