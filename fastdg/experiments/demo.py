"""The demo: every algorithm on every task, domain left out and seed; resumable."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
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


Unit = tuple[str, str, int, int, str]
_task = cache(lambda name, seed: TASKS[name](seed))


@_one_thread()
def _trained(plan: Plan, unit: Unit) -> dict[str, Any]:
    _, name, left_out, seed, algorithm = unit
    task: Task = _task(name, seed)
    return train(task, SETTINGS[name], algorithm, left_out, seed, plan.steps_of(name))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _results(
    plan: Plan, units: Sequence[Unit], workers: int
) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """``(key, result)`` of each unit as it ends."""
    if min(workers, len(units)) <= 1:
        for unit in units:
            yield unit[0], _trained(plan, unit)
        return
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(min(workers, len(units)), spawn, _belong_to, (os.getpid(),))
    ended = False
    try:
        with _uninterrupted():
            keys = {pool.submit(_trained, plan, unit): unit[0] for unit in units}
        for future in as_completed(keys):
            yield keys[future], future.result()
        ended = True
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a training process was killed, for want of memory perhaps; the same command goes on "
            "from here, and --workers 1 takes the least"
        ) from error
    finally:
        if not ended:  # nobody waits for units that nobody will write down
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes begun inside leave an interrupt to the one that writes the results."""
    if threading.current_thread() is not threading.main_thread():
        yield  # which alone may say so
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _belong_to(parent: int) -> None:
    """End this process when its parent does, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@_one_thread()
def run(
    plan: Plan,
    path: Path,
    fresh: bool = False,
    progress: Callable[[str, int, int], None] = lambda key, done, total: None,
    workers: int = 1,
) -> dict[str, Any]:
    """Run what ``path`` does not hold yet, writing it after every unit.

    A run killed at any moment goes on where it was: units are deterministic, and the file is
    replaced whole. Other algorithms, tasks and more seeds add to what is there.

    Args:
        plan: what to run.
        path: of the results, JSON. ``settings``: of each task what `Setting.identity` says.
            ``machine``: where it was run last. ``runs``: key -> what `training.train` gives.
        fresh: ignore what is there.
        progress: told the last unit's key, how many are done, and how many there are.
        workers: processes that train side by side, each a unit on one thread.

    Returns:
        The same, with only the plan's runs, and ``plan`` itself: ``algorithms``, ``tasks`` and
        ``seeds``.

    Raises:
        ValueError: ``path`` holds results of other settings, or is not a result file.
        ChildProcessError: a worker was killed.
    """
    settings = {name: SETTINGS[name].identity(plan.steps_of(name)) for name in TASKS}
    kept = None if fresh else load_results(path, "settings", settings)
    runs: dict[str, Any] = {} if kept is None else kept["runs"]
    results: dict[str, Any] = {"settings": settings, "machine": machine(), "runs": runs}
    write_json(results, path)
    units = list(plan.units())
    left = [unit for unit in units if unit[0] not in runs]
    done = len(units) - len(left)
    progress(left[0][0] if left else "", done, len(units))
    with closing(_results(plan, left, workers)) as found:
        for key, result in found:
            runs[key] = result
            write_json(results, path)
            done += 1
            progress(key if done < len(units) else "", done, len(units))
    asked = {"algorithms": plan.algorithms, "tasks": plan.tasks, "seeds": plan.seeds}
    return results | {"plan": asked, "runs": {key: runs[key] for key, *_ in units}}
