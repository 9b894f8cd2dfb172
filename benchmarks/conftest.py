"""`pytest benchmarks/`: each question's contenders, in groups.

``--benchmark-disable`` runs each once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file, as for measure.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # peers and compilers warn about themselves
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether this run only looks whether everything still works."""
    return bool(request.config.getoption("--benchmark-disable"))


@pytest.fixture(scope="session")
def truths() -> Iterator[dict[Any, Any]]:
    """Results of float64 per-sample gradients, computed once a case."""
    found: dict[Any, Any] = {}
    yield found
    found.clear()
