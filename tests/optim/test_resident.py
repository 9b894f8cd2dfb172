"""What a step leaves behind is gone after the next; `benchmarks/resident.py` measures long runs."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from runs import RUNS, Adversarial
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

WARM, STEPS = 20, 60
STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes of memory that the process has to itself; 0 where the system does not tell."""
    if not STATUS.exists():
        return 0
    return int(STATUS.read_text().split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.parametrize("name", RUNS)
def test_memory_stays_flat(name: str) -> None:
    """Neither objects of Python add up, nor graphs, which it does not see, nor the process."""
    run = RUNS[name]()
    for _ in range(WARM):
        run.step()
    gc.collect()
    objects, memory = len(gc.get_objects()), resident()
    for _ in range(STEPS):
        run.step()
    gc.collect()
    assert len(gc.get_objects()) - objects < STEPS / 2
    assert resident() - memory < 4 * 2**20
    seen: list[StorageWeakRef] = []
    model = run.opt.objective if isinstance(run, Adversarial) else run.model
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(
                lambda module, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
            )
    for _ in range(6):
        run.step()
    assert sum(not storage.expired() for storage in seen) <= len(seen) / 3
