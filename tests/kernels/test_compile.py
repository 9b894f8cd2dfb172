"""The kernels compiled for GPUs that are not here: they fit, and nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have

PREFETCHED = {"ViT MLP", "conv 3x3", "conv 1x1", "stem", "bf16 MLP", "bf16 3x3", "bf16 1x1"}


def rows_of(script: str) -> list[dict[str, Any]]:
    """What a script prints; in a process of its own, as Triton cannot leave its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    rows = [json.loads(line) for line in child.stdout.splitlines()]
    for row in rows:
        print(*(f"{name}={value}" for name, value in row.items()))
    return rows


@pytest.fixture(scope="module")
def built() -> list[dict[str, Any]]:
    return rows_of("aot.py")


def test_everything_is_compiled_for_each(built: list[dict[str, Any]]) -> None:
    kernels = [{row["kernel"] for row in built if row["capability"] == c} for c in SHARED_LIMIT]
    assert kernels[0] == kernels[1] == kernels[2]
    assert len(kernels[0]) == 25


def test_nothing_spills_and_everything_fits(built: list[dict[str, Any]]) -> None:
    for row in built:
        assert row["stack"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], row


def test_products_are_on_tensor_cores_and_their_operands_prefetched(
    built: list[dict[str, Any]],
) -> None:
    for row in built:
        if row["kernel"] in ("finish_kernel", "transpose_kernel") or row["work"] not in (
            "ViT MLP",
            "conv 3x3",
        ):
            continue
        assert row["wgmma" if row["capability"] >= 90 else "mma"] > 0, row
        assert row["async_copies"] > 0, row


def test_loads_of_the_next_products_are_under_way(built: list[dict[str, Any]]) -> None:
    rows = [
        row
        for row in built
        if row["kernel"] in ("outer_moments_kernel", "outer_domain_kernel")
        and row["work"] in PREFETCHED
    ]
    assert len(rows) >= 57
    for row in rows:
        assert row["under_way"] > 0, row
        assert row["buffers"] >= (3 if row["wgmma"] and row["tf32"] else 2), row


def test_another_batch_size_compiles_nothing() -> None:
    for row in rows_of("specialisations.py"):
        counts = row["kernels"]
        assert counts[0] == counts[-1], row
        assert counts[0] <= {"backward": 27, "agreement": 16}.get(row["op"], 15), row
