"""Kill runs at random moments, and see whether they end as if nobody had.

A script of its own, started by `test_kills.py`: it imports torch once, never lets it start a
thread, and forks a process for every part of a run, so that a restart costs milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import torch
from runs import RUNS, resume, save

from fastdg.examples import resume as documented

CHECKPOINT, RESULT = "checkpoint.pt", "result.pt"


def forked(work: Callable[[], None]) -> int:
    """Do ``work`` in a process that nothing of comes back from."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def train(make: Callable[[], Any], folder: Path) -> None:
    """From the checkpoint on, if there is one, until the end; then write what has come out."""
    run = make()
    resume(run, folder / CHECKPOINT)
    while run.steps < 24:
        run.step()
        if run.steps % 2 == 0:
            save(run, folder / CHECKPOINT)
    torch.save(run.result(), folder / RESULT)


def example(folder: Path) -> None:
    """The one in the documentation."""
    torch.save(documented.train(folder / CHECKPOINT).state_dict(), folder / RESULT)


def done(child: int) -> bool:
    """Whether the process came to its end; False if it was killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise RuntimeError(f"a part of the run failed with status {status}")
    return True


def survives(train: Callable[[Path], None], folder: Path, kills: int) -> dict[str, int]:
    """A run without a kill against one that is killed so many times: how often it was, and how
    often it then had a checkpoint to go on from.

    A run that was faster than its killer is compared, and starts anew.
    """
    whole, broken = folder / "whole", folder / "broken"
    for part in (whole, broken):
        part.mkdir(parents=True)
    start = time.perf_counter()
    assert done(forked(lambda: train(whole)))
    seconds = time.perf_counter() - start
    expected = torch.load(whole / RESULT, weights_only=True)
    killed = resumed = 0
    ended = False
    while killed < kills or not ended:
        if ended:
            (broken / RESULT).unlink()
            (broken / CHECKPOINT).unlink()
        child = forked(lambda: train(broken))
        if killed < kills:
            time.sleep(random.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)  # its number is its own until `done` has waited for it
        ended = done(child)
        if not ended:
            killed += 1
            resumed += (broken / CHECKPOINT).exists()
            continue
        found = torch.load(broken / RESULT, weights_only=True)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if not torch.equal(found[key], value):
                raise AssertionError(f"{key} is not what it is without a kill")
    return {"killed": killed, "resumed": resumed}


def main(folder: Path, kills: int, names: list[str]) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    torch.use_deterministic_algorithms(True)
    random.seed(time.time_ns())
    runs = {name: partial(train, make) for name, make in RUNS.items()} | {"example": example}
    for k, name in enumerate(names or runs):
        print(json.dumps({name: survives(runs[name], folder / str(k), kills)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
