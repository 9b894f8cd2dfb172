"""The table of a run of the zoo: results.json, and README.md made from it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fastdg.experiments.machine import processor
from fastdg.files import locked

HERE = Path(__file__).parent
COMMAND = "OMP_NUM_THREADS=1 python tests/zoo"
HEAD = """# The zoo

Models of timm, torchvision and transformers, and every module class of torch.nn, small and with
random weights, each in training and in eval mode. For each, `fastdg.domain_gradients`,
`fastdg.domain_moments` and `fastdg.per_sample_norms` of six samples in three domains are compared
in float64 with plain autograd, one backward a sample. This file is made by

    {command}

which took {minutes:.0f} minutes and writes `results.json` beside it; with words, it runs the cases
whose names hold one of them and replaces their rows. `test_zoo.py` runs a few.

The error of a statistic of a parameter is the norm of the difference, relative to the norm of that
parameter's per-sample gradients (to its square for a variance), or to {floor:g} of the largest such
norm of the model where that is more: a bias before a batch norm has a gradient of nothing but
rounding. *small* counts the parameters of which this is so, whose comparison is less sharp. In
timm and torchvision, parameters that start at zero or nearly, as layer scales, are drawn: they
would hide what lies below them. A case is wrong where an error is above {tolerance:g}. *rules*
counts the parameters served by a rule, *pulled* by a rule and a backward of what makes the tensor,
*slow* by a call of autograd for each domain or each sample.
"""


def machine() -> dict[str, str]:
    """What the run was made with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("timm", "torchvision", "transformers"):
        here = importlib.util.find_spec(name)
        versions[name] = importlib.metadata.version(name) if here else "not installed"
    return {"processor": f"{processor()}, 1 thread", **versions}


def outcome(row: dict[str, Any]) -> str:
    """``"right"``, ``"wrong"``, ``"refused"`` or ``"not here"``."""
    if "not here" in row:
        return "not here"
    if "refused" in row:
        return "refused"
    return "wrong" if row["wrong"] else "right"


def render(results: dict[str, Any]) -> str:
    """README.md of these results."""
    rows = results["rows"]
    parts = [
        HEAD.format(
            command=COMMAND,
            minutes=max(1, sum(row["seconds"] for row in rows) / 60),
            floor=results["floor"],
            tolerance=results["tolerance"],
        )
    ]
    parts += ["## Summary", "", *summary(rows), ""]
    ran = len({(row["family"], row["name"]) for row in rows})
    if ran < results["models"]:
        parts.append(f"{results['models'] - ran} of the {results['models']} models were not run.\n")
    parts.append(", ".join(f"{k} {v}" for k, v in results["machine"].items()) + ".\n")
    for title, key in (("Refused", "refused"), ("Not here", "not here")):
        some = [f"- {name(row)}: {row[key]}" for row in rows if outcome(row) == key]
        if some:
            parts += [f"## {title}", "", *some, ""]
    parts += ["## All", "", "| model | mode | parameters | rules | pulled | slow | small | error |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in sorted(rows, key=name):
        if outcome(row) in ("right", "wrong"):
            counts = (row[k] for k in ("parameters", "rules", "pulled", "slow", "small"))
            error = f"{row['worst']:.0e}" + (f" **wrong**: {row['where']}" if row["wrong"] else "")
            cells = (f"{row['family']} {row['name']}", row["mode"], *counts, error)
            parts.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(parts) + "\n"


def name(row: dict[str, Any]) -> str:
    return f"{row['family']} {row['name']} ({row['mode']})"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each family, and one for all."""
    lines = [
        "| family | cases | right | wrong | refused | not here | parameters | rules | pulled | slow"
        " | largest error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in [*dict.fromkeys(row["family"] for row in rows), "all"]:
        mine = [row for row in rows if family in ("all", row["family"])]
        count = Counter(map(outcome, mine))
        ran = [row for row in mine if "worst" in row]
        totals = [sum(row[k] for row in ran) for k in ("parameters", "rules", "pulled", "slow")]
        worst = max((row["worst"] for row in ran), default=0.0)
        outcomes = [count[k] for k in ("right", "wrong", "refused", "not here")]
        cells = (family, len(mine), *outcomes, *totals, f"{worst:.0e}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def add(new: dict[str, Any], settings: dict[str, Any], known: set[tuple[str, str]]) -> None:
    """Replace or add the row of a case, in both files; several runs may do so at once.

    Rows of models that are not ``known`` any more, by family and name, are dropped.
    """
    path = HERE / "results.json"
    with locked(path):
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in rows if (row["family"], row["name"]) in known]
        names = [name(row) for row in rows]
        k = names.index(name(new)) if name(new) in names else len(rows)
        rows[k : k + 1] = [new]
        results = {"machine": machine(), **settings, "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "README.md").write_text(render(results))
