"""README and CONTRIBUTING: their Python runs as it stands there, and the numbers are measured."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastdg

ROOT = Path(__file__).resolve().parent.parent


def snippets(document: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_python_snippets_run(document: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    x, y, domains = torch.randn(12, 5), torch.arange(12) % 3, torch.arange(12) % 2
    names = {"torch": torch, "F": F, "fastdg": fastdg, "model": model, "x": x, "y": y}
    names |= {"domains": domains, "loader": [(x, y, domains)] * 2, "batches": [(x, y)] * 2}
    words = torch.randn(128, 8)
    names["text_encoder"] = lambda texts: torch.stack([words[[*map(ord, t)]].sum(0) for t in texts])
    names["teacher"] = lambda x: torch.randn(len(x), 3)
    names["encoder"] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8))
    names["pairs"] = [(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8))] * 2
    blocks = snippets(document)
    assert blocks
    for block in blocks:
        exec(compile(block, document, "exec"), names)
    if document == "README.md":
        assert names["moments"].variance["0.weight"].shape == (2, 8, 5)


def test_tables_are_what_the_result_files_say() -> None:
    path = ROOT / "benchmarks" / "render.py"
    spec = importlib.util.spec_from_file_location("render", path)
    assert spec is not None and spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render.filled(text) == text, "run python benchmarks/render.py"
