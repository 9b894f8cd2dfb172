"""A rank that dies, or does not come, is an error on the others and no hang."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from parallel import comes_late, dies
from pool import Pool


def test_what_the_others_say() -> None:
    pool = Pool(2)
    answer, _ = pool.run(2, comes_late, timeout=timedelta(seconds=2))
    assert answer.startswith("RuntimeError: VREx: rank 0 could not reach the other 1 ranks")
    answer = pool.run(2, dies, answers=1)[0]
    assert answer.startswith("RuntimeError: VREx: rank 0 could not reach the other 1 ranks")
    pool.close()


@pytest.mark.matrix
def test_torchrun_ends_them_all() -> None:
    script = str(Path(__file__).parent / "lost.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "made step 0" in done.stdout
    assert "made step 1" not in done.stdout
    assert "SIGKILL" in done.stderr
