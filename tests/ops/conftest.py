"""Tests are no package (import-mode=importlib): the cases are imported by their plain name."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastdg

sys.path.append(str(Path(__file__).parent))

BACKENDS = [name for name, (available, _) in fastdg.backends().items() if available]
DEVICES = {"reference": "cpu", "cpp": "cpu", "triton": "cuda", "cuda": "cuda"}


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a backend, which computes every op meanwhile."""
    with fastdg.use_backend(request.param):
        yield DEVICES[request.param]


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set; skipped where this machine does not run it."""
    try:
        before = torch.ops.fastdg_cpp.set_instruction_set(request.param)
    except RuntimeError:
        pytest.skip(f"this machine or this build has no {request.param}")
    yield request.param
    torch.ops.fastdg_cpp.set_instruction_set(before)
