"""Run all of the zoo, or the cases whose names hold one of the words given, and write the table.

OMP_NUM_THREADS=1 python tests/zoo [WORD ...]
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import zoo_modules
import zoo_transformers
import zoo_vision
from zoo_cases import Case

TESTS = Path(__file__).parent.parent
sys.path += [str(TESTS), str(TESTS / "statistics")]  # as conftest.py does for pytest

import zoo_oracle  # noqa: E402
import zoo_report  # noqa: E402
from torchvision_ops import fit_torchvision  # noqa: E402

LIMIT = 60  # seconds a case


def row_of(case: Case, training: bool) -> dict[str, Any]:
    """What became of a case: its result, why it was refused, or why it is not here."""
    row: dict[str, Any] = {"family": case.family, "name": case.name}
    row["mode"] = "train" if training else "eval"
    start = time.perf_counter()
    signal.alarm(LIMIT)
    try:
        result = zoo_oracle.run(case, training)
        row |= result._asdict() | {"wrong": result.wrong}
    except (zoo_oracle.NotHere, TimeoutError) as error:
        row["not here"] = brief(error)
    except Exception as error:
        row["refused"] = f"{type(error).__name__}: {brief(error)}"
    finally:
        signal.alarm(0)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def brief(error: Exception) -> str:
    """The first line, not too long."""
    return next(iter(str(error).splitlines()), "")[:160]


def late(*_: object) -> None:
    raise TimeoutError(f"more than {LIMIT} seconds")


def main(words: list[str]) -> int:
    """All cases that hold a word; the table is written."""
    torch.set_num_threads(1)
    fit_torchvision()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, late)
    start = time.perf_counter()
    cases = [*zoo_modules.cases(), *zoo_transformers.cases(), *zoo_vision.cases()]
    wanted = [c for c in cases if not words or any(w in f"{c.family} {c.name}" for w in words)]
    settings = {"models": len(cases), "tolerance": zoo_oracle.TOLERANCE, "floor": zoo_oracle.FLOOR}
    known = {(case.family, case.name) for case in cases}
    rows = []
    for k, case in enumerate(wanted):
        for training in (True, False):
            row = row_of(case, training)
            rows.append(row)
            zoo_report.add(row, settings, known)
            told = row.get("not here") or row.get("refused") or f"{row['worst']:.0e}"
            line = (
                f"{k + 1}/{len(wanted)} {zoo_report.name(row)}: {zoo_report.outcome(row)}, {told}"
            )
            print(line, f"{time.perf_counter() - start:.0f} s", flush=True)
    print("\n".join(zoo_report.summary(rows)))
    return int(any(zoo_report.outcome(row) in ("wrong", "refused") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
