"""The WILDS example learns, on its data set and on its loaders."""

from __future__ import annotations

import re

import pytest


@pytest.mark.filterwarnings("ignore")  # of libraries that wilds imports
def test_learns(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wilds", reason="WILDS is not installed: pip install wilds")
    from fastdg.examples import wilds_training

    wilds_training.main()
    found = dict(re.findall(r"(\w+): (\d+) %", capsys.readouterr().out))
    assert found.keys() == {"Fishr", "Fish", "AgrSum"}
    assert all(int(accuracy) >= 80 for accuracy in found.values()), found
