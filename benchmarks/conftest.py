"""`pytest benchmarks/`: each question's contenders, in groups.

``--benchmark-disable`` runs each once. Timed are the cases of `cases.SAMPLE`, in some minutes; all
of them with ``--all-cases``, and those asked for with ``-k``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file, as for measure.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="time every case, not a sample")


def _sampled(config: pytest.Config) -> bool:
    option = config.option
    return not (option.all_cases or option.benchmark_disable or option.keyword)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from cases import SAMPLE

    for item in items:  # peers and compilers warn about themselves
        item.add_marker(pytest.mark.filterwarnings("default"))
    if not _sampled(config):
        return
    cases = [getattr(item, "callspec", None) for item in items]
    keys = [spec and spec.params.get("case") for spec in cases]
    left_out = [i for i, case in zip(items, keys, strict=True) if case and case.key not in SAMPLE]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    if not _sampled(config):
        return ""
    return "a sample of the cases; --all-cases times every one, -k NAME those of that name"


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
