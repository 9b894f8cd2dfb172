"""Training runs side by side, a core each, and their results in one file; resumable."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from ..catalogue import nearest
from .machine import machine
from .storage import DATA, load_results, update_results, with_data

Unit = Callable[[], dict[str, Any]]  # one run; it can be pickled, and is deterministic
Told = Callable[[str, int, int], None]
SPARING = 20  # times the seconds of a write pass before the next one


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
def _trained(unit: Unit) -> dict[str, Any]:
    return unit()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _results(
    units: Mapping[str, Unit], workers: int
) -> Generator[tuple[str, dict[str, Any]], None, None]:
    """Return ``(key, result)`` of each unit as it ends."""
    if min(workers, len(units)) <= 1:
        for key, unit in units.items():
            yield key, _trained(unit)
        return
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(min(workers, len(units)), spawn, _belong_to, (os.getpid(),))
    ended = False
    try:
        with _uninterrupted():
            keys = {pool.submit(_trained, unit): key for key, unit in units.items()}
        for future in as_completed(keys):
            yield keys[future], future.result()
        ended = True
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "workers: a training process was killed, perhaps for lack of memory. Repeat the "
            "command to resume; --workers 1 needs the least memory."
        ) from error
    finally:
        if not ended:  # stop units whose results nobody will write
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


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError unless ``names`` are some of ``known``."""
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        near = [name for each in unknown if (name := nearest(each, known))]
        raise ValueError(
            f"{what}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}."
            + (f" Do you mean {', '.join(dict.fromkeys(near))}?" if near else "")
        )


def silent(key: str, done: int, total: int) -> None:
    """Ignore the progress."""


@_one_thread()
def run_units(
    units: Mapping[str, Unit],
    settings: Mapping[str, Any],
    path: Path,
    fresh: bool = False,
    progress: Told = silent,
    workers: int = 1,
    fields: Collection[str] = (),
    data: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run the units that ``path`` does not hold yet, and write it after each.

    A run killed at any moment goes on where it was: units are deterministic, and the file is
    replaced whole. Where writing takes long, because the file has grown, it is written less often,
    so that writing takes at most a twentieth of the time. An error or an interrupt writes it; a
    kill loses the units since the last time. Several runs may add to one file at the same time:
    each adds its units to the file. If two runs finish the same unit, the result that is written
    first stays, and both return it.

    Args:
        units: key -> the function to run, in this order.
        settings: of the runs; results depend on them.
        path: of the results, JSON. ``settings``; ``machine``: where it was run last; ``runs``:
            key -> the result of its unit; ``data``, if given; a checksum.
        fresh: ignore the results that are there at the beginning.
        progress: called with the last unit's key, the number of units done, and of all.
        workers: processes that train side by side, each a unit on one thread.
        fields: entries that every result has.
        data: data set -> fingerprint of the data that the runs read.

    Returns:
        The same, with only these units' runs.

    Raises:
        ValueError: ``path`` holds results of other settings or data, or is not a result file.
        OSError: ``path`` cannot be read or written.
        ChildProcessError: a worker was killed.
    """
    made: dict[str, Any] = {}  # by this run
    known: dict[str, Any] = {}  # by this run and in the file

    def valid(results: dict[str, Any]) -> bool:
        runs = results["runs"].values()
        whole = isinstance(results.get(DATA, {}), dict)
        whole = whole and results.keys() - {DATA} == {"settings", "machine", "runs"}
        return whole and all(isinstance(run, dict) and run.keys() >= set(fields) for run in runs)

    def load(path: Path) -> dict[str, Any] | None:
        return load_results(path, "settings", settings, valid)

    def change(found: dict[str, Any] | None) -> dict[str, Any]:
        known.update(made | found["runs"] if found else made)
        runs = dict(known) if found is None else {**found["runs"], **made, **found["runs"]}
        of_data = with_data(path, found, data or {})
        return {"settings": settings, "machine": where, **of_data, "runs": runs}

    where = machine()
    results = update_results(path, (lambda path: None) if fresh else load, change)
    left = {key: unit for key, unit in units.items() if key not in known}
    done = len(units) - len(left)
    progress(next(iter(left), ""), done, len(units))
    due, waiting = 0.0, False
    try:
        with closing(_results(left, workers)) as found:
            for key, result in found:
                made[key] = result
                waiting = True
                if (began := time.monotonic()) >= due:
                    results, waiting = update_results(path, load, change), False
                    ended = time.monotonic()
                    due = ended + SPARING * (ended - began)
                done += 1
                progress(key if done < len(units) else "", done, len(units))
    finally:
        if waiting:
            results = update_results(path, load, change)
    return results | {"runs": {key: known[key] for key in units}}
