"""`benchmarks/gpu.py`, which proves and times fastdg on a GPU, rehearsed on the CPU: every part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
# In place of compute-sanitizer: runs what follows its options
TOOL = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift 2; done
"$@"; status=$?
echo "========= ERROR SUMMARY: 0 errors"
exit $status
"""


def call(parts: Sequence[Sequence[str]], out: Path, **environment: str) -> list[int]:
    """Run parts, one after the other in one process; return their statuses."""
    told = ["--out", str(out), "--device", "cpu", "--small"]
    program = "import gpu; print([gpu.main(arguments) for arguments in {}])"
    env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), **environment}
    for name in ("TRITON_INTERPRET", "FASTDG_BACKEND"):
        env.pop(name, None)
    command = [sys.executable, "-W", "ignore", "-c", program.format([[*p, *told] for p in parts])]
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


def rows(out: Path, part: str) -> dict[str, dict[str, Any]]:
    """The rows of a part by name; none says that it failed."""
    found = [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()]
    assert not [row for row in found if "error" in row]
    return {row["row"]: row for row in found}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of what needs no process of its own."""
    folder = tmp_path_factory.mktemp("rows")
    waits = "capture after 0 steps: resnet50: AgrSum", "waits: resnet50: AgrSum"
    steps = "resnet50, bf16: AgrSum", "resnet50, bf16: Fish"
    parts = [["ops"], *(["steps", "--only", s] for s in steps)]
    parts += [["waits", "--only", w] for w in waits]
    assert call(parts, folder) == [0] * len(parts)
    return folder


def test_build_installs_and_names_what_it_built(tmp_path: Path) -> None:
    assert call([["build"]], tmp_path) == [0]
    found = rows(tmp_path, "build")
    assert found["build"]["build"].endswith("FASTDG_BUILD=none")
    assert found["build"]["backends"]["reference"][0]
    assert found["versions"]["torch"] and found["device"]["threads"]


@pytest.mark.matrix
def test_tests_run_in_shards_and_those_that_passed_are_left_out_again(tmp_path: Path) -> None:
    shard = ["tests", "--shard", "2/2"]
    assert call([shard], tmp_path) == [0]
    found = rows(tmp_path, "tests")["shard 2 of 2"]
    assert found["tests"] == 11 and found["by folder"] == {"tests/gradients": {"passed": 11}}
    reports = tmp_path / "reports-2-of-2.jsonl"
    lines = reports.read_text().splitlines()
    last = json.loads(lines[-1])
    reports.write_text("\n".join([*lines[:-1], json.dumps({**last, "outcome": "failed"})]) + "\n")
    assert call([shard], tmp_path) == [0]
    assert rows(tmp_path, "tests")["shard 2 of 2"] == found
    assert [json.loads(line)["test"] for line in reports.read_text().splitlines()[11:]] == [
        last["test"]
    ]


@pytest.mark.matrix
def test_the_sanitizer_wraps_the_tests_or_is_said_to_be_missing(tmp_path: Path) -> None:
    assert call([["sanitizer"]], tmp_path, PATH="") == [0]
    assert "not on PATH" in rows(tmp_path, "sanitizer")["memcheck"]["missing"]
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(TOOL)
    tool.chmod(0o755)
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    assert call([["sanitizer"]], tmp_path, PATH=path) == [0]
    found = rows(tmp_path, "sanitizer")["memcheck"]
    assert found["clean"] and found["tests"] == 4 and not found["failed"]


@pytest.mark.matrix
def test_ops_are_right_on_each_backend_and_have_a_rate(out: Path) -> None:
    found = rows(out, "ops")
    errors = {name: row for name, row in found.items() if name.startswith("error: ")}
    assert len(errors) > 30
    for name, row in errors.items():
        assert row["errors"] and max(row["errors"].values()) <= row["reach"], (name, row)
    assert sum("triton" in row["errors"] for row in errors.values()) > 20
    rates = [row for name, row in found.items() if name.startswith("rate: ")]
    assert all(row.keys() & {"share of cuBLAS", "share of copy"} for row in rates)
    assert len(rates) > 20
    assert len(found) == len(errors) + len(rates) + 1


def measured(found: dict[str, dict[str, Any]]) -> set[str]:
    """The steps that ran, each beside its unit; peers that are missing or refuse say so."""
    ran = {name: row for name, row in found.items() if "missing" not in row}
    for name, row in ran.items():
        assert row["ms"] > 0 and row["launches"] > 0 and row["peak GB"] > 0
        assert name.endswith((": plain", ": plain, a step a domain")) or row["ratio"] > 0, name
    others = (row["missing"] for row in found.values() if row not in ran.values())
    assert all("is not installed" in why or why.startswith("refused: ") for why in others)
    return {name.partition(": ")[2] for name in ran}


@pytest.mark.matrix
def test_steps_are_timed_beside_plain_ones(out: Path) -> None:
    found = rows(out, "steps")
    ran = measured(found)
    assert ran >= {"AgrSum", "AgrSum, a backward a domain", "Fish", "Fishr(all)"}
    lines = (out / "steps.jsonl").read_text()
    statuses = call(
        [["steps", "--only", "resnet50, bf16: AgrSum"], ["steps", "--seconds", "0"]], out
    )
    assert statuses == [0, 3]  # the first has its rows, the second leaves all others
    assert (out / "steps.jsonl").read_text() == lines


@pytest.mark.matrix
def test_every_step_of_both_networks(tmp_path: Path) -> None:
    parts = [["steps"], ["waits"]]
    assert call(parts, tmp_path) == [0, 0]
    found = rows(tmp_path, "steps")
    assert len(found) == 2 * 3 * 14
    assert len(measured(found)) >= 12
    assert {row.get("waits", "nowhere") for row in rows(tmp_path, "waits").values()} == {"nowhere"}


@pytest.mark.matrix
def test_waits_and_captures_have_rows(out: Path) -> None:
    assert {
        name: row.get("waits", row.get("capture")) for name, row in rows(out, "waits").items()
    } == {
        "waits: resnet50: AgrSum": "nowhere",
        "capture after 0 steps: resnet50: AgrSum": "ran; the CPU has no graphs",
    }


def test_the_shell_script_calls_the_parts_and_says_which_failed(tmp_path: Path) -> None:
    script = SCRIPT.with_suffix(".sh")
    env = {**os.environ, "PYTHON": sys.executable, "GPU_OPTIONS": "--device cpu --small"}
    command = ["bash", str(script), str(tmp_path), "table", "no-part"]
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == 1
    assert "failed or unfinished: no-part (status 2)\n" in child.stderr
    text = (tmp_path / "table.md").read_text()
    assert "No rows of: build, tests, sanitizer, ops, steps, waits." in text


@pytest.mark.matrix
def test_the_table_has_measured_beside_predicted(out: Path, tmp_path: Path) -> None:
    for path in out.glob("*.jsonl"):
        (tmp_path / path.name).write_text(path.read_text())
    row = {"row": "resnet50, bf16: AgrSum", "ms": 12.0, "ratio": 1.25, "launches": 9}
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write(json.dumps(row | {"peak GB": 4.5}) + "\n")
    assert call([["table"]], tmp_path) == [0]
    committed = json.loads((SCRIPT.parent / "results/gpu_predictions.json").read_text())
    said = committed["devices"]["H200 SXM"]["resnet50, bf16: AgrSum"]
    cells = ["12.00", "1.25", "4.50", "9", "1.08", f"{said['floor']:.2f}"]
    text = (tmp_path / "table.md").read_text()
    assert f"| resnet50, bf16: AgrSum | {' | '.join(cells)} |" in text
    assert "No rows of: build, tests, sanitizer." in text
    for name in (*rows(out, "ops"), *rows(out, "steps"), *rows(out, "waits")):
        assert name.removeprefix("error: ").removeprefix("rate: ") in text or name == "ceilings"
