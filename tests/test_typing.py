"""What a type checker says of a user's file, by the package's own hints (``py.typed``)."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdg
from fastdg import DomainOptimizer

pytest.importorskip("mypy", reason="mypy is not installed: pip install 'fastdg[dev]'")

ROOT = Path(__file__).resolve().parent.parent
# An ignored error that is none is an error too: --strict has --warn-unused-ignores
USER = """
from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg import DomainMoments, DomainOptimizer


def wrapped(model: nn.Module) -> list[DomainOptimizer]:
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    return [
        fastdg.ERM(base),
        fastdg.Fishr(base, penalty_weight=10.0, anneal_steps=5, params="head", num_domains=3),
        fastdg.PCGrad(base, reduction="sum", generator=torch.Generator()),
        fastdg.CAGrad(base, c=0.5, absent="drop"),
        fastdg.GramSurgery(base, fastdg.weightings.UPGrad()),
        fastdg.MIRO(base, model, layers=["0"]),
        fastdg.Fish(base, num_domains=3, meta_lr=0.5),
        fastdg.SWAD(fastdg.VREx(base), model),
        fastdg.SAM(fastdg.Fishr(base), rho=0.05, model=model),
    ]


def train(model: nn.Module, opt: DomainOptimizer, x: Tensor, y: Tensor, domains: Tensor) -> float:
    losses = F.cross_entropy(model(x), y, reduction="none")
    opt.zero_grad()
    loss = opt.backward(losses, domains)
    assert_type(loss, Tensor)
    opt.step()
    assert_type(opt.statistics["loss"], Tensor)
    return float(loss)


def look(model: nn.Module, losses: Tensor, domains: Tensor) -> None:
    moments = fastdg.domain_moments(losses, domains, params=model)
    assert_type(moments, DomainMoments)
    assert_type(moments.variance, dict[str, Tensor])
    assert_type(fastdg.domain_gram(losses, domains, params=model), Tensor)
    assert_type(fastdg.per_sample_norms(losses, params=model), Tensor)
    gradients = fastdg.domain_gradients(losses, domains, params=model)
    assert_type(fastdg.per_sample_products(losses, gradients, params=model), Tensor)
    with fastdg.record(model, params="all") as tape:
        losses = F.cross_entropy(model(losses), domains, reduction="none")
    fastdg.domain_moments(tape, losses, domains)
    print(fastdg.explain(losses, model), fastdg.backends(), fastdg.DomainIds(["a", "b"])(["a"]))


def mistaken(base: torch.optim.Optimizer) -> None:
    fastdg.Fishr(base, penalty_weight="large")  # type: ignore[arg-type]
    fastdg.Fishr(base, penalty=10.0)  # type: ignore[call-arg]
    fastdg.CAGrad(base, normalize=True)  # type: ignore[call-arg]
    fastdg.CAGrad(base, 3)  # type: ignore[call-arg]
    fastdg.ERM(base, takes=("x",))  # type: ignore[call-arg]
    fastdg.PCGrad()  # type: ignore[call-arg]
    fastdg.Fishr(base).penalty  # type: ignore[attr-defined]
    fastdg.fishr(base)  # type: ignore[attr-defined]
"""


def checked(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """mypy's answer on ``user.py`` in the folder."""
    # MYPYPATH would check the package itself; on PYTHONPATH it is looked at as installed
    options = (*options, "--cache-dir", str(ROOT / ".mypy_cache"), "--config-file", "")
    return subprocess.run(
        [sys.executable, "-P", "-m", "mypy", *options, "user.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_users_file_has_no_errors_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    done = checked(tmp_path, "--strict")
    assert done.returncode == 0, done.stdout + done.stderr


def test_type_checkers_know_the_arguments_that_there_are(tmp_path: Path) -> None:
    """Of each wrapper, as its class declares them."""
    wrappers = {
        name: kind
        for name in fastdg.__all__
        if isinstance(kind := getattr(fastdg, name), type) and issubclass(kind, DomainOptimizer)
    }
    revealed = "".join(f"reveal_type(fastdg.{name})\n" for name in wrappers)
    (tmp_path / "user.py").write_text(f"import fastdg\n\n{revealed}")
    said = re.findall(r'Revealed type is "def \((.*)\) -> ', checked(tmp_path).stdout)
    found = {
        name: set(re.findall(r"(?:^|, )(\w+): ", arguments))
        for name, arguments in zip(wrappers, said, strict=True)
    }
    assert found == {
        name: set(inspect.signature(kind).parameters) for name, kind in wrappers.items()
    }
