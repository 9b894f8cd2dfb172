"""The tables of README and of the documentation hold the numbers that were measured."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_tables_are_what_the_result_files_say() -> None:
    path = ROOT / "benchmarks" / "render.py"
    spec = importlib.util.spec_from_file_location("render", path)
    assert spec is not None and spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    for document, text in render.filled().items():
        assert document.read_text(encoding="utf-8") == text, "run python benchmarks/render.py"
