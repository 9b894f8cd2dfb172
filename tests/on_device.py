"""Where the tests' tensors and models are: on the device that FASTDG_TEST_DEVICE names, as "cuda";
by default on the CPU.

It is torch's default device while a file is imported and while its tests run, so tests name no
device. Left out on another one are tests about the CPU: those of `CPU`, and by themselves those
with the mark ``cpu(reason)``. The files of `OWN` take each device there is by themselves.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

DEVICE = os.environ.get("FASTDG_TEST_DEVICE", "cpu")
OWN = ("ops", "kernels")
# Path under tests/ -> reason
CPU = {
    "cli": "programs of their own",
    "distributed": "ranks over gloo",
    "domainbed": "programs of their own",
    "examples": "programs of their own",
    "gradients/fuzz": "processes of their own",
    "kernels/test_compile.py": "compiles for GPUs that are not there",
    "kernels/test_counts.py": "fake tensors",
    "ops/test_cpp.py": "the C++ ops",
    "ops/test_cpp_columns.py": "the C++ ops",
    "ops/test_cuda_emulation.py": "the CUDA ops on the CPU",
    "ops/test_fuzz.py": "processes of their own",
    "ops/test_pool.py": "threads of the C++ ops",
    "optim/test_accelerate.py": "the framework chooses the device",
    "optim/test_kills.py": "processes of their own",
    "optim/test_lightning.py": "the framework chooses the device",
    "optim/test_resident.py": "the memory of the process",
    "optim/test_trainer.py": "the framework chooses the device",
    "studies": "programs of their own",
    "zoo": "processes of their own",
}


def _place(path: Path) -> str:
    return path.as_posix().rpartition("/tests/")[2]


def about_the_cpu(item: pytest.Item) -> str | None:
    """Why a test is about the CPU, or None."""
    if (mark := item.get_closest_marker("cpu")) is not None:
        return str(mark.args[0])
    path = _place(item.path)
    if "/" not in path:
        return "files, packaging and texts"
    return next((why for at, why in CPU.items() if path == at or path.startswith(f"{at}/")), None)


def enter(path: Path) -> None:
    """Make the device of a file's tests the default one."""
    if DEVICE != "cpu":
        own = _place(path).partition("/")[0] in OWN
        torch.set_default_device("cpu" if own else DEVICE)


class Drawn(TorchFunctionMode):
    """Numbers that a CPU generator draws move to the default device: the same ones everywhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        generator = kwargs.get("generator")
        given = any(isinstance(x, torch.Tensor) for x in args)
        if generator is None or generator.device.type != "cpu" or "device" in kwargs or given:
            return func(*args, **kwargs)
        grad = kwargs.pop("requires_grad", False)
        drawn = func(*args, **kwargs, device="cpu").to(torch.get_default_device())
        return drawn.requires_grad_() if grad else drawn


def begin() -> None:
    """Before the first file is imported."""
    if DEVICE != "cpu":
        Drawn().__enter__()
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            backend.fp32_precision = "ieee"
