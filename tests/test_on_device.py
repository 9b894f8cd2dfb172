"""The device of the tests: every file takes the named one, or says why it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import on_device

HERE = Path(__file__).parent
PROGRAM = """
import sys
from pathlib import Path
import torch
sys.path.append(sys.argv[1])
import on_device
on_device.begin()
assert torch.backends.cudnn.conv.fp32_precision == "ieee"
here = Path(sys.argv[1])
on_device.enter(here / "optim" / "test_erm.py")
draws = torch.Generator().manual_seed(3)
made = [torch.zeros(2), torch.nn.Linear(2, 2).weight, torch.randn(4, generator=draws)]
made += [torch.randperm(4, generator=draws), torch.rand(2, generator=draws, requires_grad=True)]
assert all(x.device.type == "meta" for x in made), [x.device for x in made]
assert made[-1].requires_grad and made[-1].is_leaf
assert torch.randn(2, generator=draws, device="cpu").device.type == "cpu"
on_device.enter(here / "ops" / "test_columns.py")
assert torch.zeros(2).device.type == torch.randn(2, generator=draws).device.type == "cpu"
"""


def python(*call: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FASTDG_TEST_DEVICE": "meta"}
    command = [sys.executable, *map(str, call)]
    return subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)


def test_what_is_about_the_cpu_is_there() -> None:
    assert [path for path in (*on_device.CPU, *on_device.OWN) if not (HERE / path).exists()] == []


def test_tensors_and_draws_of_cpu_generators_are_on_the_device() -> None:
    child = python("-c", PROGRAM, HERE)
    assert child.returncode == 0, child.stderr


def test_tests_about_the_cpu_are_left_out_on_a_device() -> None:
    files = HERE / "test_domain_ids.py", HERE / "optim" / "test_kills.py"
    child = python("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    last = child.stdout.splitlines()[-1]
    assert child.returncode == 0 and "skipped" in last and "passed" not in last, child.stdout
    assert "about the CPU: files, packaging and texts" in child.stdout
    assert "about the CPU: processes of their own" in child.stdout
