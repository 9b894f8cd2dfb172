"""What every test relies on: a fixed seed, poisoned scratch memory, data where there is some."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, at its first import: kernels then run on CPU tensors, interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Deterministic mode also fills torch.empty with NaN: an op that forgets to write an element of
    # its output is found.
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fastdg_data() -> Path:
    """The folder of data sets that FASTDG_DATA names; the test is skipped without one."""
    folder = os.environ.get("FASTDG_DATA")
    if folder is None:
        pytest.skip("FASTDG_DATA is not set: no data sets to test with")
    if not Path(folder).is_dir():
        pytest.skip(f"FASTDG_DATA={folder} is not a folder: no data sets to test with")
    return Path(folder)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
