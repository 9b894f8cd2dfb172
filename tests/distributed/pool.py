"""Processes that are started once and run what they are asked to, as the ranks of a group."""

from __future__ import annotations

import contextlib
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

TIMEOUT = timedelta(seconds=300)


class Pool:
    """At most ``size`` ranks."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.groups = 0
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(
        self,
        world: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: timedelta = TIMEOUT,
        answers: int | None = None,
    ) -> list[Any]:
        """``function(*args, rank, world)`` on each rank; what it returns, or the error's text.

        ``timeout``: of the process group. ``answers``: wait for those of so many ranks alone.
        """
        self.groups += 1
        store = Path(self.folder.name) / f"store{self.groups}"
        for pipe in self.pipes[:world]:
            pipe.send((world, store, timeout, function, args))
        found = []
        for pipe in self.pipes[: answers or world]:
            if not pipe.poll(TIMEOUT.total_seconds()):
                raise TimeoutError("a rank does not answer")
            found.append(pipe.recv())
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):  # one that has died
                pipe.send(None)
        for process in self.processes:
            process.join(10)
        self.folder.cleanup()


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    while (task := pipe.recv()) is not None:
        world, store, timeout, function, args = task
        distributed.init_process_group(
            "gloo",
            store=distributed.FileStore(str(store), world),
            rank=rank,
            world_size=world,
            timeout=timeout,
        )
        try:
            answer = function(*args, rank, world)
        except Exception:
            answer = traceback.format_exc()
        distributed.destroy_process_group()
        pipe.send(answer)
