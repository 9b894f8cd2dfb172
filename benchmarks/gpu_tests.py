"""The test-suite with its tensors on a device, and part of it under compute-sanitizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_rig import Rig, Row

ROOT = Path(__file__).resolve().parents[1]
SHARD = (1, 1)  # K of N, by files
FOLDERS = ("ops", "kernels", "gradients", "statistics", "func", "optim", "weightings")
REHEARSED = ("tests/gradients/test_layout.py", "tests/gradients/test_small_gradients.py")
# Of the interpreter's grid of sizes, the ones that cross a tile
SANITIZED = ("tests/ops/test_conformance.py", "tests/ops/test_columns.py")
TOOL = "compute-sanitizer"
FOUND = "ERROR SUMMARY: 0 errors"


def pytest(rig: Rig, reports: Path, *more: str, before: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run pytest until its end or the end of the time; its exit status (-1: killed) and output."""
    # A run inside pytest would take the outer one's workers for its own
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment = {**inherited, "GPU_REPORTS": str(reports), "FASTDG_TEST_DEVICE": rig.device}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if rig.device == "cuda":
        environment.pop("TRITON_INTERPRET", None)
    environment["GPU_SHARD"] = "{}/{}".format(*SHARD)
    command = [*before, sys.executable, "-P", "-m", "pytest", "-q", "-p", "gpu_reports"]
    command += ["-p", "no:cacheprovider", *more]
    left = max(20.0, rig.seconds - (time.monotonic() - rig.began))
    log = reports.with_suffix(".log")
    with log.open("w") as file:
        try:
            child = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=left,
            )
            status = child.returncode
        except subprocess.TimeoutExpired:
            status = -1
    return status, log.read_text()


def counts(reports: Path) -> Row:
    """The tests by folder and outcome, the last of each, and the failed ones."""
    text = reports.read_text() if reports.exists() else ""
    rows = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    last: dict[str, Any] = {row["test"]: row for row in rows}
    found: dict[str, Counter[str]] = {}
    for test, row in last.items():
        folder = "/".join(test.split("/")[:2])
        found.setdefault(folder, Counter())[row["outcome"]] += 1
    failed = {t: r.get("said", "")[-600:] for t, r in last.items() if r["outcome"] == "failed"}
    skipped = Counter(r.get("said", "") for r in last.values() if r["outcome"] == "skipped")
    return {
        "tests": len(last),
        "by folder": {folder: dict(count) for folder, count in found.items()},
        "failed": failed,
        "skipped": dict(skipped.most_common(12)),
    }


def run(rig: Rig) -> int:
    """A shard; what has passed is left out by the next call."""
    k, n = SHARD
    rig.out.mkdir(parents=True, exist_ok=True)
    reports = rig.out / f"reports-{k}-of-{n}.jsonl"
    where = REHEARSED if rig.small else tuple(f"tests/{folder}" for folder in FOLDERS)
    workers = []
    if find_spec("xdist") is not None and not rig.small:
        workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    status, output = pytest(rig, reports, *workers, *where)
    row = {"row": f"shard {k} of {n}", "device": rig.device, "exit status": status}
    row |= counts(reports)
    if not row["tests"] or status not in (-1, 0, 1, 5):
        row["error"] = output[-1500:]
    rig.write("tests", row)
    return int(status == -1)


def sanitizer(rig: Rig) -> int:
    """Memory errors of the kernels in the tests of the ops."""
    if shutil.which(TOOL) is None:
        rig.write("sanitizer", {"row": "memcheck", "missing": f"{TOOL} is not on PATH"})
        return 0
    rig.out.mkdir(parents=True, exist_ok=True)
    reports = rig.out / "sanitizer.reports.jsonl"
    tool = (TOOL, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9")
    where = REHEARSED[:1] if rig.small else SANITIZED
    only = [] if rig.small else ["-k", "cuda or triton"]
    status, output = pytest(rig, reports, *only, *where, before=tool)
    row = {"row": "memcheck", "exit status": status, **counts(reports)}
    row["clean"] = FOUND in output and status != 9
    row["said"] = [line for line in output.splitlines() if line.startswith("=====")][-12:]
    if not row["tests"] or status not in (-1, 0, 1, 5, 9):
        row["error"] = output[-1500:]
    rig.write("sanitizer", row)
    return 0
