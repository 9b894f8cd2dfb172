"""The rows that a run takes by default of tests marked ``product``; the others are ``matrix``.

A product tries each case in all surroundings. The default tries every case in some surroundings,
and every surrounding with some case: a few rows that have each value of each argument between them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import pytest

LEFT_OUT = "left out: "
Row = tuple[Hashable, ...]


def cover(rows: Sequence[Row]) -> set[int]:
    """The numbers of few rows that have each value of each column between them.

    Always the row with the most values that are still missing; of several, the one whose values
    were taken least often, so that each meets others.
    """
    missing = {entry for row in rows for entry in enumerate(row)}
    taken: Counter[tuple[int, Hashable]] = Counter()
    chosen: set[int] = set()
    while missing:

        def gain(k: int) -> tuple[int, int]:
            entries = list(enumerate(rows[k]))
            return sum(e in missing for e in entries), -sum(taken[e] for e in entries)

        best = max(range(len(rows)), key=gain)
        chosen.add(best)
        taken.update(enumerate(rows[best]))
        missing.difference_update(enumerate(rows[best]))
    return chosen


def columns(item: pytest.Function, joined: Sequence[str]) -> Row:
    """What tells a row of a test from its others: the value of each parametrization.

    ``joined``: arguments all of whose combinations are wanted. A value of a fixture that has
    ``axes`` is as many.
    """
    params = item.callspec.params
    together = [mark.args[0] for mark in item.iter_markers("parametrize")]
    groups = [names.split(",") if isinstance(names, str) else names for names in together]
    groups = [[name.strip() for name in names] for names in groups]
    groups += [[name] for name in params.keys() - {name for names in groups for name in names}]
    first = [name for names in groups if joined and set(names) & set(joined) for name in names]
    row: list[Hashable] = [tuple(id(params[name]) for name in sorted(first))]
    for names in sorted(names for names in groups if not set(names) & set(first)):
        row += getattr(params[names[0]], "axes", [tuple(id(params[name]) for name in names)])
    return tuple(row)


def mark(items: Sequence[pytest.Item]) -> None:
    """Give what the default leaves out of products the mark ``matrix``."""
    products: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if not isinstance(item, pytest.Function) or item.get_closest_marker("matrix"):
            continue
        if item.get_closest_marker("product") and hasattr(item, "callspec"):
            products[item.nodeid.partition("[")[0]].append(item)
    for rows in products.values():
        joined = next(rows[0].iter_markers("product")).args
        chosen = cover([columns(item, joined) for item in rows])
        for k, item in enumerate(rows):
            if k not in chosen:
                item.add_marker("matrix")


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """For `collected` in conftest.py, where this file is a plugin."""
    for item in items:
        print(f"{LEFT_OUT}{item.nodeid}")
