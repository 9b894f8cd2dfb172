"""Timing in turns, peak memory of a process of its own, and the machine in words."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]

# Repetitions within one turn: short runs need more than one after another's data left the caches.
TURN_SECONDS = 0.06


def timed(run: Run) -> float:
    """Seconds of one call; freeing its result is part of it, as it is in a training loop."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(
    runs: Mapping[str, Run], cost: Mapping[str, float], seconds: Mapping[str, float]
) -> dict[str, list[float]]:
    """Call all ``runs`` in turns, each for about ``seconds``, the slow ones at least once.

    A turn of a short run is several calls, of which the first, on cold caches, is not counted.
    Fewer turns are spread over the whole time.

    Args:
        runs: name -> what to time, called before.
        cost: name -> roughly how long a call takes.
        seconds: name -> how long to spend.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    turns = {
        name: max(1 if cost[name] > 4 else 3, int(seconds[name] / max(cost[name], TURN_SECONDS)))
        for name in runs
    }
    rounds = max(turns.values())
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name, run in runs.items():
                if turn * turns[name] // rounds == (turn + 1) * turns[name] // rounds:
                    continue
                calls = max(1, min(6, int(TURN_SECONDS / cost[name])))
                if calls > 1:
                    run()
                times[name] += [timed(run) for _ in range(max(1, calls - 1))]
            gc.collect()
    finally:
        gc.enable()
    return times


def turns(runs: Mapping[str, Run], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of a call, the median of so many in a row; all ``runs`` take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(statistics.median(timed(run) for _ in range(calls)))
            gc.collect()
    finally:
        gc.enable()
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, quartiles, minimum in seconds, and how many."""
    low, middle, high = (
        statistics.quantiles(times, n=4) if len(times) > 1 else (times[0], times[0], times[0])
    )
    return {"median": middle, "q25": low, "q75": high, "min": min(times), "runs": len(times)}


def _status() -> dict[str, int]:
    text = Path("/proc/self/status").read_text()
    found = re.findall(r"^(VmHWM|RssAnon|RssFile|RssShmem):\s+(\d+) kB", text, re.MULTILINE)
    return {name: int(kib) * 1024 for name, kib in found}


def peak_memory(make: Callable[[], Run], warm: Callable[[], Run]) -> int | None:
    """Peak bytes that ``make()()`` holds, in a forked process; None where the system does not tell.

    Memory of the process itself is not counted: ``warm`` runs the same code on something tiny
    first, and mapped files (libraries) are left out. Everything else is: weights, batch,
    activations, results, scratch memory and whatever is kept for reuse. The process must not have
    computed anything before (threads do not survive a fork).
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe, contextlib.suppress(Exception):
            run = warm()
            run()
            del run
            _trim()
            before = _status()["RssAnon"]
            run = make()
            for _ in range(2 if timed(run) < 1 else 0):
                run()
            _trim()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            run()
            after = _status()
            pipe.write(str(after["VmHWM"] - after["RssFile"] - after["RssShmem"] - before))
            pipe.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text) if text else None


def _trim() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def told(found: Mapping[str, Any], out: Path | None) -> None:
    """Print the results as JSON, and write them to ``out``, if given."""
    from fastdg.files import replace

    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if out:
        replace(out, lambda file: file.write(text.encode()))
    print(text)


def environment(command: str) -> dict[str, Any]:
    """Machine, versions, command, date and commit of a measurement."""
    import fastdg

    def version(package: str) -> str | None:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as of

        try:
            return of(package)
        except PackageNotFoundError:
            return None

    cpu = platform.processor() or platform.machine()
    flags = ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        cpu = re.search(r"model name\s*:\s*(.*)", text)[1]  # type: ignore[index]
        flags = re.search(r"flags\s*:\s*(.*)", text)[1]  # type: ignore[index]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ("torch", "fastdg", "numpy", "backpack-for-pytorch", "opacus", "torchjd")
    return {
        "machine": {
            "cpu": cpu.strip(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "simd": [f for f in ("avx2", "fma", "avx512f") if f in flags.split()],
            "memory_gib": round(memory, 1),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "backends": {name: list(state) for name, state in fastdg.backends().items()},
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "fastdg", "csrc", "kernels")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (
        " (with changes)" if changed else ""
    )


def in_process(arguments: list[str]) -> Any:
    """Run this interpreter on ``arguments`` and return the JSON that its last output line holds."""
    done = subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])
