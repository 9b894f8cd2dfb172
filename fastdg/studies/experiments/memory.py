"""The memory a step takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.autograd.profiler import profile

Result = TypeVar("Result")


def measured(step: Callable[[], Result]) -> tuple[Result, int]:
    """Return ``step()`` and the most bytes of CPU tensors that it holds at a time, without tensors
    that were alive before it."""
    # Not `torch.profiler`'s: it makes a tree of all events, in ten times a step's time
    with _silent(), profile(profile_memory=True, use_kineto=True) as profiler:
        result = step()
    results = profiler.kineto_results
    alive = peak = 0
    events = (event for event in results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return result, peak


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler writes notes about itself to the process's error output."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
