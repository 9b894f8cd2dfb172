"""Measure what the steps of every run leave behind.

A script of its own, started by `test_resident.py`: a worker of pytest-xdist receives messages in a
thread, whose objects would count as the steps'.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import torch
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


def left_behind(name: str) -> dict[str, int]:
    """Python's objects and bytes that came with further steps, and of the layers' inputs in the
    last steps those that are still held."""
    torch.manual_seed(0)
    run = RUNS[name]()
    for _ in range(WARM):
        run.step()
    gc.collect()
    objects, memory = len(gc.get_objects()), resident()
    for _ in range(STEPS):
        run.step()
    gc.collect()
    found = {"objects": len(gc.get_objects()) - objects, "bytes": resident() - memory}
    seen: list[StorageWeakRef] = []
    model = run.opt.objective if isinstance(run, Adversarial) else run.model
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(
                lambda module, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
            )
    for _ in range(6):
        run.step()
    held = sum(not storage.expired() for storage in seen)
    return {**found, "inputs": len(seen), "held": held}


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    gc.collect()
    gc.freeze()
    for name in RUNS:
        print(json.dumps({name: left_behind(name)}), flush=True)
