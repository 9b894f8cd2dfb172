"""Fingerprints tell data apart, by contents and not by names or times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastdg.studies.benchmark import datasets
from fastdg.studies.data import digits
from fastdg.studies.data.fingerprint import of_arrays, of_files


def test_of_files(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"data" * 1_000_000)
    other.write_bytes(one.read_bytes())
    assert of_files([one]) == of_files([other])
    other.write_bytes(one.read_bytes()[:-1] + b"b")
    assert of_files([one]) != of_files([other])
    with pytest.raises(OSError, match="gone"):
        of_files([tmp_path / "gone"])


def test_of_arrays() -> None:
    x = np.arange(6.0)
    found = {of_arrays([y]) for y in (x, x.reshape(2, 3), x.astype(np.float32), x[::-1])}
    assert len(found) == 4
    assert of_arrays([x.copy()]) in found


def test_of_a_data_set(tmp_path: Path) -> None:
    assert datasets.fingerprint("digits", None) == digits.fingerprint()
    path = tmp_path / datasets.HEART
    path.parent.mkdir()
    path.write_bytes(b"x")
    assert datasets.fingerprint("heart", tmp_path) == of_files([path])
