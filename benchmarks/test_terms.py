"""What do MIRO, RISE, ADIOS and SWAD cost? Each term's goal stands beside it."""

from typing import Any

import pytest
from contenders import OURS
from terms import TERMS

CASES = [(name, way) for name, term in TERMS.items() for way in term.ways]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_term(benchmark: Any, name: str, way: str, smoke: bool) -> None:
    term, samples = TERMS[name], 8 if smoke else None
    if way == OURS:
        assert term.error(samples) <= term.tolerance
    run = term.ways[way](term.made(samples))
    benchmark.group = f"{term.title}; to reach: {term.goal}"
    run()
    short = "step" not in name
    benchmark.pedantic(run, rounds=1 if smoke else 50 if short else 4)
