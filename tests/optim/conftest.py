"""Tests are no package (import-mode=importlib), so what they share is imported by plain name."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from bases import BASES, CASES, Case, Make


@pytest.fixture(params=BASES)
def make(request: pytest.FixtureRequest) -> Make:
    """Makes the optimizer to wrap from parameters."""
    return BASES[request.param]


@pytest.fixture(params=CASES, ids=lambda case: f"{case.wrapper}-{case.base}")
def case(request: pytest.FixtureRequest) -> Case:
    """A wrapper, and an optimizer for it."""
    return request.param
