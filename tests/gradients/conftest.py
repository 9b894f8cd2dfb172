"""Tests are no package (import-mode=importlib): the oracle is imported by its plain name."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdg.gradients import engine

sys.path.append(str(Path(__file__).parent.parent / "statistics"))
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def autograd(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function with the derivatives of autograd."""

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(engine.OwnDerivative, "register", lambda self: [])
            return function()

    return run
