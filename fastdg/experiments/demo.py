"""The demo: every algorithm on every task, domain left out and seed; resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.digits import TASKS, Task
from .machine import machine
from .settings import ALGORITHMS, DEFAULT, SETTINGS
from .storage import load_results, write_json
from .training import train


def _check(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"{what}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}"
        )


@dataclass(frozen=True)
class Plan:
    """What a demo runs; ``steps`` are each task's own by default."""

    algorithms: tuple[str, ...] = DEFAULT
    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = 3
    steps: int | None = None

    def __post_init__(self) -> None:
        _check("algorithms", self.algorithms, tuple(ALGORITHMS))
        _check("datasets", self.tasks, tuple(TASKS))
        if self.seeds < 1:
            raise ValueError(f"seeds: expected >= 1, got {self.seeds}")
        if (
            self.steps is not None and self.steps < 3
        ):  # one before the penalty, one to time, one whose memory is measured
            raise ValueError(f"steps: expected >= 3, got {self.steps}")

    def steps_of(self, task: str) -> int:
        return SETTINGS[task].steps if self.steps is None else self.steps

    def units(self) -> Iterator[tuple[str, str, int, int, str]]:
        """``(key, task, left out, seed, algorithm)``; algorithms in turn, so that their times are
        comparable. The key is ``task/left out/seed/algorithm``."""
        for task in self.tasks:
            for seed in range(self.seeds):
                for left_out in TASKS[task](seed).tested:
                    for algorithm in self.algorithms:
                        key = f"{task}/{left_out}/{seed}/{algorithm}"
                        yield key, task, left_out, seed, algorithm


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps this small gain little from a second thread, and wait long for it on a busy machine;
    and numbers then do not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(
    plan: Plan,
    path: Path,
    fresh: bool = False,
    progress: Callable[[str, int, int], None] = lambda key, done, total: None,
) -> dict[str, Any]:
    """Run what ``path`` does not hold yet, on one thread, writing it after every unit.

    A run killed at any moment goes on where it was: units are deterministic, and the file is
    replaced whole. Other algorithms, tasks and more seeds add to what is there.

    Args:
        plan: what to run.
        path: of the results, JSON. ``settings``: of each task what `Setting.identity` says.
            ``machine``: where it was run last. ``runs``: key -> what `training.train` gives.
        fresh: ignore what is there.
        progress: told the unit's key, how many are done, and how many there are.

    Returns:
        The same, with only the plan's runs, and ``plan`` itself: ``algorithms``, ``tasks`` and
        ``seeds``.

    Raises:
        ValueError: ``path`` holds results of other settings, or is not a result file.
    """
    settings = {name: SETTINGS[name].identity(plan.steps_of(name)) for name in TASKS}
    kept = None if fresh else load_results(path, "settings", settings)
    results: dict[str, Any] = {
        "settings": settings,
        "machine": machine(),
        "runs": {} if kept is None else kept["runs"],
    }
    write_json(results, path)
    units = list(plan.units())
    made: dict[tuple[str, int], Task] = {}
    for done, (key, name, left_out, seed, algorithm) in enumerate(units):
        progress(key, done, len(units))
        if key not in results["runs"]:
            if (name, seed) not in made:
                made[name, seed] = TASKS[name](seed)
            task, setting = made[name, seed], SETTINGS[name]
            results["runs"][key] = train(
                task, setting, algorithm, left_out, seed, plan.steps_of(name)
            )
            write_json(results, path)
    progress("", len(units), len(units))
    asked = {"algorithms": plan.algorithms, "tasks": plan.tasks, "seeds": plan.seeds}
    runs = {key: results["runs"][key] for key, *_ in units}
    return results | {"plan": asked, "runs": runs}
