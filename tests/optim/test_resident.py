"""What a step leaves behind is gone after the next; `benchmarks/resident.py` measures long runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from residents import STEPS
from runs import RUNS

pytestmark = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what is freed"
)


@pytest.fixture(scope="module")
def left_behind() -> dict[str, dict[str, int]]:
    """What each run leaves behind, measured in one process."""
    script = Path(__file__).with_name("residents.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_memory_stays_flat(name: str, left_behind: dict[str, dict[str, int]]) -> None:
    """Neither objects of Python add up, nor graphs, which it does not see, nor the process."""
    row = left_behind[name]
    assert row["objects"] < STEPS / 2
    assert row["bytes"] < 4 * 2**20
    assert row["held"] <= row["inputs"] / 3
    assert row["inputs"] > 0
