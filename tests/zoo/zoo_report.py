"""The table of a run of the zoo: results.json, and README.md made from it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fastdg.files import locked
from fastdg.studies.experiments.machine import processor

HERE = Path(__file__).parent
COMMAND = "OMP_NUM_THREADS=1 python tests/zoo"
STEPS = ("PCGrad", "AgrSum", "Fishr")
COUNTS = ("parameters", "rules", "chained", "slow", "small")
COLUMNS = ("model", "mode", *COUNTS, "statistics", *STEPS, "at")
HEAD = """# The zoo

Models of timm, torchvision and transformers, PEFT's methods on one of these, and every module class
of torch.nn, small and with random weights, each in training and in eval mode. For each, in float64,
with six samples in three domains, plain autograd with one backward a sample is the truth that is
compared with

- *statistics*: `fastdg.domain_gradients`, `fastdg.domain_moments` and `fastdg.per_sample_norms`,
- *PCGrad*, *AgrSum* and *Fishr*, on all parameters: `.grad` after `opt.backward`, each of a forward
  of its own. Fishr's is made without fused attention, with a weight that gives penalty and loss
  gradients of one size. *none* names the operation of which autograd has no second derivative;
  *not run* is a step that was left to a further run.

This file is made by

    {command}

which takes about {minutes:.0f} minutes of one processor core and writes `results.json` beside it.
It runs the cases that have no row of the commit that is there; with words, those of them whose
names hold one. *at* is the commit of a row. `test_zoo.py` runs a few.

The error of a parameter is the norm of the difference, relative to the norm of that parameter's
per-sample gradients (to its square for a variance; to the larger one of its mean and its penalty's
gradient for Fishr), or to {floor:g} of the largest such norm of the model where that is more: a
bias before a batch norm has a gradient of nothing but rounding. *small* counts the parameters of
which this is so, whose comparison is less sharp. AgrSum asks for signs: where a domain's gradient
is below {tolerance:g} of that norm, but not zero in each sample, its sign may be one of rounding,
and both what it gives with agreement and without are right. In timm, torchvision and PEFT,
parameters that start at zero or nearly, as layer scales, are drawn: they would hide what lies below
them. A case is wrong where an error is above {tolerance:g}. *rules* counts the parameters served by
a rule, *chained* by a rule and a backward of what makes the tensor, *slow* by a call of autograd
for each domain or each sample.
"""


def commit() -> str:
    """The commit that is checked out, with a plus where the library differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    root = HERE.parent.parent
    changed = git("status", "--porcelain", "--", *(str(root / d) for d in ("fastdg", "csrc")))
    return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")


def machine() -> dict[str, str]:
    """What the run was made with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("timm", "torchvision", "transformers", "peft"):
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
    ran = set(map(name, rows))
    cases = [f"{model} ({mode})" for model in results["models"] for mode in ("train", "eval")]
    if missing := [case for case in cases if case not in ran]:
        parts.append(f"{len(missing)} of {len(cases)} were not run: {', '.join(missing)}.\n")
    parts.append(", ".join(f"{k} {v}" for k, v in results["machine"].items()) + ".\n")
    for title, key in (("Refused", "refused"), ("Not here", "not here")):
        some = [f"- {name(row)}: {row[key]}" for row in rows if outcome(row) == key]
        if some:
            parts += [f"## {title}", "", *some, ""]
    parts += slow(rows)
    parts += ["## All", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in sorted(rows, key=name):
        if outcome(row) in ("right", "wrong"):
            counts = (row[k] for k in COUNTS)
            errors = (cell(row, kind, results["tolerance"]) for kind in ("statistics", *STEPS))
            cells = (f"{row['family']} {row['name']}", row["mode"], *counts, *errors, row["at"])
            parts.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(parts) + "\n"


def cell(row: dict[str, Any], kind: str, tolerance: float) -> str:
    """An error in the table."""
    error = row["errors"][kind]
    if isinstance(error, str):
        return error
    return f"{error:.0e}" + ("" if error <= tolerance else f" **wrong**: {row['where']}")


def slow(rows: list[dict[str, Any]]) -> list[str]:
    """Which operations are called for each domain or sample, the most common ones first."""
    models: dict[str, set[str]] = {}
    count: Counter[str] = Counter()
    for row in rows:
        for operation in row.get("slow_at", ()):
            models.setdefault(operation, set()).add(f"{row['family']} {row['name']}")
            count[operation] += 1
    lines = ["## Slow", "", "| operation | cases | models |", "|---|---|---|"]
    for operation, cases in count.most_common():
        some = sorted(models[operation])
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        lines.append(f"| {operation} | {cases} | {', '.join(some[:3])}{more} |")
    return [*lines, ""]


def told(row: dict[str, Any]) -> str:
    """The outcome of a row in some words."""
    if outcome(row) in ("not here", "refused"):
        return f"{outcome(row)}, {row[outcome(row)]}"
    errors = (e if isinstance(e, str) else f"{e:.0e}" for e in row["errors"].values())
    return f"{outcome(row)}, {' '.join(errors)}" + (f", {row['where']}" if row["wrong"] else "")


def name(row: dict[str, Any]) -> str:
    return f"{row['family']} {row['name']} ({row['mode']})"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each family, and one for all."""
    lines = [
        "| family | cases | right | wrong | refused | not here | parameters | rules | chained"
        " | slow | largest error | steps compared | largest error |",
        "|---" * 13 + "|",
    ]
    for family in [*dict.fromkeys(row["family"] for row in rows), "all"]:
        mine = [row for row in rows if family in ("all", row["family"])]
        count = Counter(map(outcome, mine))
        ran = [row["errors"] for row in mine if "errors" in row]
        totals = [
            sum(row.get(k, 0) for row in mine) for k in ("parameters", "rules", "chained", "slow")
        ]
        worst = max((errors["statistics"] for errors in ran), default=0.0)
        steps = [errors[k] for errors in ran for k in STEPS if not isinstance(errors[k], str)]
        outcomes = [count[k] for k in ("right", "wrong", "refused", "not here")]
        cells = (family, len(mine), *outcomes, *totals, f"{worst:.0e}", len(steps))
        lines.append("| " + " | ".join(map(str, (*cells, f"{max(steps, default=0.0):.0e}"))) + " |")
    return lines


def rows() -> list[dict[str, Any]]:
    """Those there are."""
    path = HERE / "results.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def add(new: dict[str, Any], settings: dict[str, Any], known: set[tuple[str, str]]) -> None:
    """Replace or add the row of a case, in both files; several runs may do so at once.

    Rows of models that are not ``known`` any more, by family and name, are dropped.
    """
    path = HERE / "results.json"
    with locked(path):
        kept = [row for row in rows() if (row["family"], row["name"]) in known]
        names = [name(row) for row in kept]
        k = names.index(name(new)) if name(new) in names else len(kept)
        kept[k : k + 1] = [new]
        results = {"machine": machine(), **settings, "rows": kept}
        path.write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "README.md").write_text(render(results))
