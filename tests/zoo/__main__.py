"""Run the zoo and write the table: the cases that have no row of this commit yet; with words, those
of them whose names hold one.

OMP_NUM_THREADS=1 python tests/zoo [--no-fishr] [WORD ...]

Without Fishr's steps a run takes half of the time, and a further one makes them. A run may be
stopped and started again, and goes on where it was. Seconds are of the processor, so that a limit
holds beside other work, too.
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
import zoo_peft
import zoo_transformers
import zoo_vision
from zoo_cases import Case

TESTS = Path(__file__).parent.parent
sys.path += [str(TESTS), str(TESTS / "statistics")]  # as conftest.py does for pytest

import zoo_oracle  # noqa: E402
import zoo_report  # noqa: E402
from torchvision_ops import fit_torchvision  # noqa: E402

LIMIT = 900  # seconds of the processor for a case


def row_of(case: Case, training: bool, commit: str, fishr: bool) -> dict[str, Any]:
    """What became of a case: its result, why it was refused, or why it is not here."""
    row: dict[str, Any] = {"family": case.family, "name": case.name}
    row |= {"mode": "train" if training else "eval", "at": commit}
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        result = zoo_oracle.run(case, training, fishr)
        row |= result._asdict() | {"wrong": result.wrong}
    except (zoo_oracle.NotHere, TimeoutError) as error:
        row["not here"] = brief(error)
    except Exception as error:
        row["refused"] = f"{type(error).__name__}: {brief(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    row["seconds"] = round(time.process_time() - start, 1)
    return row


def brief(error: Exception) -> str:
    """The first line, not too long."""
    return next(iter(str(error).splitlines()), "")[:160]


def late(*_: object) -> None:
    raise TimeoutError(f"more than {LIMIT} seconds")


def main(words: list[str], fishr: bool) -> int:
    """The cases without a row of this commit, or all that hold a word; the table is written."""
    torch.set_num_threads(1)
    fit_torchvision()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, late)
    commit = zoo_report.commit()
    made = [
        *zoo_modules.cases(),
        *zoo_peft.cases(),
        *zoo_transformers.cases(),
        *zoo_vision.cases(),
    ]
    cases = [(case, training) for case in made for training in (True, False)]
    settings = {
        "models": [f"{case.family} {case.name}" for case in made],
        "tolerance": zoo_oracle.TOLERANCE,
        "floor": zoo_oracle.FLOOR,
    }
    known = {(case.family, case.name) for case in made}
    rows = {zoo_report.name(row): row for row in zoo_report.rows()}

    def named(case: Case, training: bool) -> str:
        mode = "train" if training else "eval"
        return zoo_report.name({"family": case.family, "name": case.name, "mode": mode})

    def is_there(name: str) -> bool:
        row = rows.get(name, {})
        complete = not fishr or row.get("errors", {}).get("Fishr") != zoo_oracle.NOT_RUN
        return row.get("at") == commit and not commit.endswith("+") and complete

    wanted = [
        one
        for one in cases
        if not is_there(named(*one)) and (not words or any(word in named(*one) for word in words))
    ]
    # What never ran comes first, then what took least
    wanted.sort(key=lambda one: rows.get(named(*one), {}).get("seconds", 0))
    new = []
    for k, (case, training) in enumerate(wanted):
        row = row_of(case, training, commit, fishr)
        new.append(row)
        zoo_report.add(row, settings, known)
        told = f"{zoo_report.name(row)}: {zoo_report.told(row)}, {row['seconds']} s"
        print(f"{k + 1}/{len(wanted)} {told}", flush=True)
    print("\n".join(zoo_report.summary(new)))
    return int(any(zoo_report.outcome(row) in ("wrong", "refused") for row in new))


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main([word for word in given if word != "--no-fishr"], "--no-fishr" not in given))
