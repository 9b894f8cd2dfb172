"""Clones of DomainBed with a trainer of their own, whose ``update`` takes x and y."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.optim import Adam

import fastdg
from fastdg.domainbed.algorithms import ENTRIES

FOLDER = Path(__file__).parent / "trainer_standin"
SCRIPT = FOLDER / "train_all.py"
NAMES = ["ERM", *(name for name in ENTRIES if name not in ("RISE", "MIRO"))]  # no such backbone


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-P", "-m", "fastdg.domainbed", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "DOMAINBED"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@cache
def results() -> dict[str, Any]:
    names = [word for name in NAMES for word in ("--algorithm", name)]
    done = called("trainer", str(SCRIPT), *names)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_runs_each_algorithm(name: str) -> None:
    row, plain = results()[name], results()["ERM"]
    losses = [values["loss"] for values in row["logged"]]
    assert len(losses) == 4 and torch.tensor(losses).isfinite().all()
    assert torch.tensor(row["weights"]).isfinite().all()
    assert row["loss"] > 0 and row["averaged"] > 0
    if name in ("PCGrad", "CAGrad", "SAM", "CORAL", "AgrSum"):  # no anneal hides these
        assert row["weights"] != plain["weights"]


def plain_loop(name: str) -> torch.Tensor:
    """The trainer's steps as a user of fastdg writes them."""
    sys.path.insert(0, str(FOLDER))
    try:
        from domainbed.algorithms import ERM  # the stand-in's
        from train_all import CLASSES, DOMAINS, FEATURES, batches
    finally:
        sys.path.remove(str(FOLDER))
        for module in [m for m in sys.modules if m.split(".")[0] in ("domainbed", "train_all")]:
            del sys.modules[module]
    torch.manual_seed(0)
    model = ERM((FEATURES,), CLASSES, DOMAINS, {"lr": 1e-2}).network
    base = Adam(model.parameters(), lr=1e-2)
    given: dict[str, Any] = {"num_domains": DOMAINS}
    opt = {
        "Fishr": lambda: fastdg.Fishr(
            base, params=list(model[1].parameters()), penalty_weight=1000.0, **given
        ),
        "CAGrad": lambda: fastdg.CAGrad(base, c=0.5, **given),
        "GroupDRO": lambda: fastdg.GroupDRO(base, eta=0.5, **given),
    }[name]()
    domains = torch.arange(DOMAINS).repeat_interleave(6)
    for batch in batches(4):
        x, y = torch.cat(batch["x"]), torch.cat(batch["y"])
        opt.zero_grad()
        opt.backward(F.cross_entropy(model(x), y, reduction="none"), domains)
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["Fishr", "CAGrad", "GroupDRO"])
def test_its_steps_are_those_of_a_plain_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr(np, "int", int, raising=False)
    expected = plain_loop(name)
    torch.testing.assert_close(
        torch.tensor(results()[name]["weights"]), expected, rtol=1e-6, atol=1e-7
    )


def test_defaults_of_the_clone_stay() -> None:
    rows = results()
    assert float(rows["GroupDRO"]["hparams"]["groupdro_eta"]) == 0.5
    assert float(rows["Fishr"]["hparams"]["lambda"]) == 1000.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no/train_all.py"], "expected a script of the clone, got no/train_all.py"),
        ([], "expected a script of the clone, got nothing"),
        ([str(Path(__file__).parent / "conftest.py")], "domainbed.algorithms: No module named"),
    ],
)
def test_errors_say_what_to_do(arguments: list[str], words: str) -> None:
    done = called("trainer", *arguments)
    assert done.returncode == 1 and words in done.stderr and "train_all.py ..." in done.stderr


def test_domainbed_itself_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    (tmp_path / "domainbed").symlink_to(FOLDER.parent / "standin" / "domainbed")
    done = called("trainer", str(script))
    assert done.returncode == 1 and "got update(self, minibatches, unlabeled)" in done.stderr
