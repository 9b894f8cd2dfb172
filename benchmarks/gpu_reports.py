"""A pytest plugin (``-p gpu_reports``): a line of JSON for each test as it ends, so that a run that
is killed has said what it saw, and the next one leaves those tests out.

GPU_REPORTS names the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FILE = Path(os.environ["GPU_REPORTS"])


def seen() -> set[str]:
    """Tests that have ended, and have not failed."""
    if not FILE.exists():
        return set()
    rows = [json.loads(line) for line in FILE.read_text().splitlines() if line.endswith("}")]
    last = {row["test"]: row["outcome"] for row in rows}
    return {test for test, outcome in last.items() if outcome != "failed"}


@pytest.hookimpl(trylast=True)  # of those that are run
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    k, n = (int(number) for number in os.environ.get("GPU_SHARD", "1/1").split("/"))
    files = {file: i for i, file in enumerate(dict.fromkeys(item.path for item in items))}
    there = seen()
    here = [i for i in items if files[i.path] % n == k - 1 and i.nodeid not in there]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(here)])
    items[:] = here


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return  # the controller of the workers writes
    if report.when == "call" or report.outcome != "passed":
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            row["said"] = str(report.longrepr)[-1500:]
        elif report.skipped:
            row["said"] = str(report.longrepr)[-200:]
        with FILE.open("a") as file:
            file.write(json.dumps(row) + "\n")
