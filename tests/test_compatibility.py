"""The table of what works with what is made of tests that there are."""

import importlib.util
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def compatibility() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compatibility", HERE / "compatibility.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table(compatibility: ModuleType) -> None:
    text = compatibility.PAGE.read_text(encoding="utf-8")
    assert compatibility.filled(text) == text, "run python tests/compatibility.py"


def test_every_yes_is_a_test_of_the_default_run(
    compatibility: ModuleType, collected: dict[str, bool]
) -> None:
    """And where a test is named for each wrapper, it has a case for each."""
    cases: dict[str, list[set[str]]] = defaultdict(list)
    for line in filter(collected.get, collected):
        test, _, case = line.partition("[")
        cases[test].append(set(case.removesuffix("]").split("-")))
    for row, column, named in compatibility.cells():
        test = named.removesuffix("[*]")
        path, _, name = test.partition("::")
        if not any(known.startswith(path) for known in cases):  # skipped as a whole
            source = (HERE / path).read_text(encoding="utf-8")
            assert "importorskip" in source and f"def {name}(" in source, (row, test)
            continue
        assert test in cases, (row, test)
        for wrapper in compatibility.COLUMNS[column] if test != named else []:
            assert any(wrapper in case for case in cases[test]), (row, test, wrapper)
