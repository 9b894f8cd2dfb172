"""`added_costs.py` once through, and its contenders do the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from added_costs import CASES, main, products, products_by_samples, sam, two_backwards
from models import problem


@pytest.mark.parametrize("case", CASES)
def test_a_case_runs(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "costs.json"
    words = ["added_costs", "--only", case, "--samples", "6", "--seconds", "0", "--out", str(file)]
    monkeypatch.setattr("sys.argv", words)
    main()
    rows = json.loads(file.read_text())["cases"][case]["rows"]
    assert rows.keys() == CASES[case][2].keys()
    assert all(row["ratio"] > 0 for row in rows.values())


def test_contenders_compute_the_same() -> None:
    on = problem("mlp", 6)
    torch.testing.assert_close(products(on)(), products_by_samples(on)(), rtol=1e-4, atol=1e-4)
    grads = []
    for make in (sam, two_backwards):
        on = problem("mlp", 6)
        make(on)()
        grads.append([p.grad for p in on.model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
