"""Tests that are about the CPU: they are left out where FASTDG_TEST_DEVICE names another device.

All others make their tensors and models on that device (`conftest.DEVICE`).
"""

from __future__ import annotations

import pytest

# Path under tests/ -> reason. A single test says so by its mark `cpu`.
CPU = {
    "cli": "programs of their own",
    "data": "files",
    "distributed": "ranks over gloo",
    "domainbed": "programs of their own",
    "examples": "programs of their own",
    "experiments": "programs of their own",
    "gradients/fuzz": "draws its own models, in processes of their own",
    "kernels/test_compile.py": "compiles for GPUs that are not there",
    "ops/test_cpp.py": "the C++ ops",
    "ops/test_cpp_columns.py": "the C++ ops",
    "ops/test_cuda_emulation.py": "the CUDA ops on the CPU",
    "ops/test_pool.py": "threads of the C++ ops",
    "zoo": "models in processes of their own",
}


def about_the_cpu(item: pytest.Item) -> str | None:
    """Why a test is about the CPU, or None."""
    if (mark := item.get_closest_marker("cpu")) is not None:
        return str(mark.args[0])
    path = item.path.as_posix().rpartition("/tests/")[2]
    if "/" not in path:
        return "files, packaging and texts"
    return next((why for at, why in CPU.items() if path == at or path.startswith(f"{at}/")), None)
