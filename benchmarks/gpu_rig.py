"""A device to measure on, and the folder of rows: time, peak memory, launches; what is there stays.

On the CPU a clock takes the place of CUDA's events, the process's peak the place of the
allocator's, and the ops that the profiler sees the place of launches: it is a rehearsal.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]
Row = dict[str, Any]


@dataclass
class Rig:
    """Where to run, and what came of it.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        small: sizes of a rehearsal.
        out: folder of rows, a file of JSON lines for each part.
        seconds: after these no further row is begun.
        only: words of the rows to make.
    """

    device: str
    small: bool
    out: Path
    seconds: float = 420.0
    only: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def turns(self) -> int:
        return 1 if self.small else 15

    # -- rows --

    def rows(self, part: str) -> list[Row]:
        path = self.out / f"{part}.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def write(self, part: str, row: Row) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row)
        with (self.out / f"{part}.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line if len(line) < 400 else line[:400] + " ...", flush=True)

    def fill(self, part: str, todo: Mapping[str, Callable[[], Row]]) -> int:
        """Make the rows that are not there; returns how many are left for a further call.

        A row that fails says so, and is made again by the next call.
        """
        there = {row["row"] for row in self.rows(part) if "error" not in row}
        left = 0
        for name, make in todo.items():
            if name in there or self.only not in name:
                continue
            if time.monotonic() - self.began > self.seconds:
                left += 1
                continue
            start = time.monotonic()
            try:
                row = {"row": name, **make()}
            except Exception as error:  # of a row: the others are made all the same
                row = {"row": name, "error": f"{type(error).__name__}: {error}"[:2000]}
            self.write(part, row | {"seconds": round(time.monotonic() - start, 1)})
            self.free()
        if left:
            print(f"{part}: {left} rows are left; call it again", flush=True)
        return left

    # -- measuring --

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time_ms(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Median milliseconds of each, run in turns after a few that are not counted."""
        warm = 1 if self.small else 3
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.turns + warm):
            for name, run in runs.items():
                taken = self._time(run)
                if turn >= warm:
                    times[name].append(taken)
        return {name: statistics.median(taken) for name, taken in times.items()}

    def _time(self, run: Run) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    def peak_bytes(self, run: Run) -> int:
        """Peak of the memory in use in one call, which begins anew here."""
        self.free()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run()
            self.wait()
            return torch.cuda.max_memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run()
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.split("VmHWM:")[1].split()[0])

    def launches(self, run: Run) -> int:
        """Launches of kernels in one call."""
        activities = [ProfilerActivity.CPU]
        if self.device == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as seen:
            run()
            self.wait()
        word = "LaunchKernel" if self.device == "cuda" else "aten::"
        return sum(event.count for event in seen.key_averages() if word in event.key)

    @contextmanager
    def no_sync(self) -> Any:
        """Within it, a wait for the device raises."""
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    def capturing(self) -> AbstractContextManager[Any]:
        """Capture of a CUDA graph."""
        return torch.cuda.graph(torch.cuda.CUDAGraph()) if self.device == "cuda" else nullcontext()


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
