"""Steps of PCGrad on MNIST_CNN beside busy processes, as the workers of a DataLoader are.

    OMP_WAIT_POLICY=passive python benchmarks/surgery_load.py \\
        --out benchmarks/results/surgery_load.json

With 0, 1 and 2 processes beside it that compute all the time, our step and the plain step take
turns of a few steps. What counts is the median of the ratios of turns that follow each other, as
the machine's speed changes for seconds at a time. Threads that spin while they wait take a core
from the busy processes and hide what a wait costs, so that the script starts itself again with
OMP_WAIT_POLICY=passive where nothing is set. Memory is the most bytes of tensors alive at one time
of a step.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Run, environment, summary, told, turns
from head_peers import adam
from models import Problem, problem
from surgery_cases import ours
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdg

SAMPLES, DOMAINS = 96, 3
BUSY = (0, 1, 2)
STEPS = 3  # of a turn
BUSY_LOOP = "n = 0\nwhile True: n += 1"


class Alive(TorchDispatchMode):
    """The most bytes alive at one time, of storages made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.bytes -= size


def plain(on: Problem) -> Run:
    """The mean of the losses, and Adam."""
    optimizer = adam(on)

    def run() -> None:
        optimizer.zero_grad()
        on.losses().mean().backward()
        optimizer.step()

    return run


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def peak(run: Run) -> int:
    run()
    with Alive() as alive:
        run()
    return alive.peak


def measure(runs: dict[str, Run], rounds: int) -> dict[str, Any]:
    """Rows by the number of busy processes."""
    rows: dict[str, Any] = {}
    for count in BUSY:
        with busy(count):
            turns(runs, 2, STEPS)  # the processes have started then
            times = turns(runs, rounds, STEPS)
        ratios = [o / p for o, p in zip(times["ours"], times["plain"], strict=True)]
        found = {
            name: {k: v if k == "runs" else round(v, 5) for k, v in summary(each).items()}
            for name, each in times.items()
        }
        rows[str(count)] = {"ratio": round(statistics.median(ratios), 4), **found}
        print(f"{count} busy: {rows[str(count)]['ratio']:.3f}x plain", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=41, help="turns of each at each load")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    arguments = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # read when the first threads start
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_WAIT_POLICY": "passive"}
        )
    runs = {
        "ours": ours(fastdg.PCGrad, DOMAINS)(problem("mnist_cnn", arguments.samples)),
        "plain": plain(problem("mnist_cnn", arguments.samples)),
    }
    for run in runs.values():
        for _ in range(8):  # the graph is looked at again in the first steps
            run()
    found = environment("python " + " ".join(sys.argv))
    found["settings"] = {
        "samples": arguments.samples,
        "domains": DOMAINS,
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
    }
    found["peak_bytes"] = {name: peak(run) for name, run in runs.items()}
    found["busy"] = measure(runs, arguments.rounds)
    told(found, arguments.out)


if __name__ == "__main__":
    main()
