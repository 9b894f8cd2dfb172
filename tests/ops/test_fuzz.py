"""Random calls of every op: arguments that no one checks by hand, and values against float64.

FASTDG_FUZZ_SEED and FASTDG_FUZZ_CALLS choose others: by default a few seconds, 3000 calls a seed
are a thorough search.
"""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import Draw, leaves
from torch import Tensor

import fastdg
from fastdg.ops.dispatch.derivatives import call
from fastdg.ops.dispatch.registry import OPS

SEED = int(os.environ.get("FASTDG_FUZZ_SEED", "0"))
CALLS = int(os.environ.get("FASTDG_FUZZ_CALLS", "300"))
BACKENDS = [name for name in ("reference", "cpp") if fastdg.backends()[name][0]]


def test_any_arguments_are_answered() -> None:
    command = [sys.executable, str(Path(__file__).parent / "fuzz.py"), str(SEED), str(CALLS)]
    beside = os.environ | {"PYTHONSAFEPATH": ""}  # the script's neighbours, under .ci/sanitize too
    run = subprocess.run(command, capture_output=True, text=True, env=beside)
    assert run.returncode == 0, f"status {run.returncode}: {run.stderr[-4000:]}"
    assert "'value'" in run.stdout


def in_double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return [in_double(part) for part in x] if isinstance(x, list) else x


def near_a_jump(name: str, args: list[Any]) -> bool:
    """Whether rounding may turn a sign, and a mask with it."""
    if name != "outer_agreement":
        return False
    a, delta, order, offsets, *_, window = args
    mean = call("outer_domain", *map(in_double, (a, delta)), order, offsets, window)
    return bool((mean[(mean != 0)].abs() < 1e-4).any())


@pytest.mark.parametrize("name", sorted(OPS))
def test_values_are_those_of_float64(name: str) -> None:
    torch.manual_seed(SEED)
    draw = Draw(random.Random(SEED))
    compared = 0
    with torch.no_grad():
        for _ in range(max(10, CALLS // 10)):
            args = draw.arguments(name)
            if near_a_jump(name, args):
                continue
            exact = in_double(args)
            with fastdg.use_backend("reference"):
                expected = leaves(call(name, *exact))
            if name == "meta_step":
                expected += leaves(exact)
            floats = [x for x in leaves(exact) if x.is_floating_point()]
            scale = 1 + max((float(x.norm()) for x in floats), default=0.0) ** 4
            for backend in BACKENDS:
                own = copy.deepcopy(args)
                inputs = own if name == "meta_step" else args
                with fastdg.use_backend(backend):
                    got = leaves(call(name, *inputs))
                if name == "meta_step":
                    got += leaves(inputs)
                for x, y in zip(got, expected, strict=True):
                    assert x.shape == y.shape
                    if not y.is_floating_point():
                        assert torch.equal(x, y), (name, backend, args)
                        continue
                    assert x.dtype == torch.float32
                    near = float((x.double() - y).norm()) <= 1e-5 * max(
                        float(y.norm()), 1e-3 * scale
                    )
                    assert near, (name, backend, args)
                compared += 1
    assert compared > 0
