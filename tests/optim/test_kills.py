"""Runs that are killed (SIGKILL) at random moments and resumed end as if nobody had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")


def test_the_weights_are_those_of_a_run_that_was_not_killed(tmp_path: Path) -> None:
    """Once each: every wrapper, chains of them, and the example of the documentation."""
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert "SWAD(Fishr)" in found and "example" in found
    assert all(row["killed"] == 1 for row in found.values())
    assert sum(row["resumed"] for row in found.values()) >= 8  # some have no checkpoint yet
