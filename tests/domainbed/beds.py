"""DomainBed or its stand-in as tests call it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastdg.domainbed.__main__ import script
from fastdg.domainbed.plug import find

STANDIN = Path(__file__).parent / "standin"


class Bed(NamedTuple):
    """One of the two, importable.

    Attributes:
        clone: whether it is DomainBed itself.
        folder: where it is.
    """

    clone: bool
    folder: str


def only(which: str) -> Any:
    """For a test of the "stand-in" alone, or of the "clone"."""
    marks = [pytest.mark.slow] if which == "clone" else []
    return pytest.mark.parametrize("bed", [pytest.param(which, marks=marks)], indirect=True)


Curve = list[dict[str, float]]


def curve_of(make: Callable[[str], type], monkeypatch: Any, *arguments: str) -> Curve:
    """Train by DomainBed's script; what each step returned. ``make`` finds the class."""
    curve: Curve = []

    def recorded(name: str) -> type:
        class Recorded(make(name)):  # type: ignore[misc]
            def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
                values = super().update(minibatches, unlabeled)
                curve.append(values)
                return values

        return Recorded

    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(find("algorithms"), "get_algorithm_class", recorded)
        script("train", arguments)
    return curve
