"""Measure every case in turns with its plain step and its peers, and write one result file.

    python benchmarks/measure.py --out benchmarks/results/cpu.json
    python benchmarks/render.py

Each case runs in a process of its own. Before anything is timed, its numbers are compared with
float64 per-sample gradients; what is wrong, missing or refuses is left out, and the file says why.
Time is the median of runs that take turns; memory is the peak of a process (see
`harness.peak_memory`).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from cases import CASES
from contenders import FLOOR, OURS, PLAIN, Case, Contender, verified
from harness import environment, in_process, interleave, peak_memory, summary, timed
from ops_cases import OPS
from result_files import keep
from terms import TERMS


def memory(case: Case, contender: Contender) -> int | None:
    setting = contender.middle
    return peak_memory(
        lambda: contender.start(case.problem(), setting),
        lambda: contender.start(case.problem(6, "tiny"), setting),
    )


def ready(case: Case, name: str, truth: Any) -> tuple[Any, dict[str, Any], float] | str:
    """A verified run at its fastest setting, what is known of it, and roughly its cost; or why
    there is none."""
    try:
        return fastest(case, name, truth)
    except (ArithmeticError, NotImplementedError, RuntimeError) as refused:
        return f"{type(refused).__name__}: {refused}".splitlines()[0][:200]


def fastest(case: Case, name: str, truth: Any) -> tuple[Any, dict[str, Any], float]:
    contender = case.contenders[name]
    best: tuple[Any, dict[str, Any], float] | None = None
    for setting in contender.settings or (None,):
        on = case.problem()
        run = contender.start(on, setting)
        row: dict[str, Any] = {} if setting is None else {"chunk": setting}
        start = time.perf_counter()
        row |= verified(case, contender, run, on, truth)
        first = time.perf_counter() - start
        cost = timed(run) if first < 8 else first
        if best is None or cost < best[2]:
            best = run, row, cost
    assert best is not None
    return best


def measure_case(key: str, seconds: float, skipped: list[str]) -> dict[str, Any]:
    """All contenders of one case but those ``skipped``."""
    case = CASES[key]
    rows: dict[str, dict[str, Any]] = {n: {"left_out": why} for n, why in case.left_out.items()}
    present = {}
    for name, contender in case.contenders.items():
        reason = "not in this run" if name in skipped else contender.unavailable()
        if reason is None:
            present[name] = contender
        else:
            rows[name] = {"left_out": reason}
    peaks = {n: None if c.slow else memory(case, c) for n, c in present.items()}

    truth = dict(case.truth(case.exact()))
    runs, cost = {}, {}
    for name in present:
        found = ready(case, name, truth)
        if isinstance(found, str):
            rows[name] = {"left_out": found}
        else:
            runs[name], rows[name], cost[name] = found
            rows[name]["peak_bytes"] = peaks[name]
    del truth
    most = (PLAIN, OURS, FLOOR)
    share = {name: seconds / (3 if name in most else 3 * len(runs)) for name in runs}
    for name, times in interleave(runs, cost, share).items():
        rows[name] |= {k: v if k == "runs" else round(v, 7) for k, v in summary(times).items()}
    for row in rows.values():
        if "median" in row:
            row["ratio"] = round(row["median"] / rows[PLAIN]["median"], 4)
    floor = None if case.floor is None else case.floor(case.problem())
    return {
        "question": case.question,
        "title": case.title,
        "floor": rows[FLOOR]["ratio"] if floor is None else round(floor, 3),
        "reach": case.reach,
        "tolerance": case.tolerance,
        "contenders": {n: rows[n] for n in (*case.contenders, *case.left_out) if n in rows},
    }


def measure_op(layer: str, seconds: float) -> dict[str, Any]:
    """One layer's ops, the library's weight gradient and a copy."""
    case = OPS[layer]()
    cost = {}
    for name, run in case.runs.items():
        run()
        cost[name] = timed(run)
    share = dict.fromkeys(case.runs, seconds / len(case.runs))
    rows: dict[str, dict[str, Any]] = {}
    for name, times in interleave(case.runs, cost, share).items():
        row = summary(times)
        if name in case.flops:
            row["gflops"] = round(case.flops[name] / row["median"] / 1e9, 1)
        if name in case.moved:
            row["gbytes"] = round(case.moved[name] / row["median"] / 1e9, 2)
        rows[name] = row
    return {"error": case.check(), "runs": rows}


def measure_term(name: str, seconds: float) -> dict[str, Any]:
    """One term's contenders, once ours has its numbers right."""
    term = TERMS[name]
    peaks = {
        way: peak_memory(
            lambda make=make: make(term.made(None)),  # type: ignore[misc]
            lambda make=make: make(term.made(6)),  # type: ignore[misc]
        )
        for way, make in term.ways.items()
    }
    if not (wrong := term.error(None)) <= term.tolerance:
        raise ArithmeticError(f"{name}: relative error {wrong:.1e}")
    runs = {way: make(term.made(None)) for way, make in term.ways.items()}
    for run in runs.values():
        run()
    cost = {way: timed(run) for way, run in runs.items()}
    share = dict.fromkeys(runs, seconds / len(runs))
    rows: dict[str, dict[str, Any]] = {
        way: {**summary(times), "peak_bytes": peaks[way]}
        for way, times in interleave(runs, cost, share).items()
    }
    for row in rows.values():
        row["ratio"] = round(row["median"] / rows[term.unit]["median"], 4)
    head = {"title": term.title, "unit": term.unit, "goal": term.goal, "error": wrong}
    return {**head, **term.extra(term.made(None)), "contenders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu.json"))
    parser.add_argument("--only", default="", help="measure these again, keep the others")
    parser.add_argument("--seconds", type=float, default=12.0, help="to spend on a case's turns")
    parser.add_argument("--skip", action="append", default=[], help="a contender that takes long")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # the process of one case
    arguments = parser.parse_args()
    if arguments.case:
        # A peer that needs more memory than there is shall say so, not bring others down.
        available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_DATA, (int(available * 1024 * 0.8),) * 2)
        kind, key = arguments.case.split(":", 1)
        if kind == "op":
            print(json.dumps(measure_op(key, arguments.seconds)))
        elif kind == "term":
            print(json.dumps(measure_term(key, arguments.seconds)))
        else:
            print(json.dumps(measure_case(key, arguments.seconds, arguments.skip)))
        return

    todo = [f"case:{key}" for key in CASES] + [f"op:{layer}" for layer in OPS]
    todo += [f"term:{name}" for name in TERMS]
    todo = [name for name in todo if arguments.only in name]
    head = environment("python " + " ".join(sys.argv))
    head["settings"] = {"dtype": "float32", "domains": 3}
    began = time.perf_counter()
    for number, name in enumerate(todo, 1):
        kind, key = name.split(":", 1)
        seconds = arguments.seconds / 6 if kind == "op" else arguments.seconds
        skips = [word for skipped in arguments.skip for word in ("--skip", skipped)]
        found = in_process([__file__, "--case", name, "--seconds", str(seconds), *skips])
        minutes = (time.perf_counter() - began) / 60
        print(f"[{number}/{len(todo)}] {minutes:4.1f} min  {brief(name, found)}", file=sys.stderr)
        tables: dict[str, dict[str, Any]] = {"cases": {}, "ops": {}, "terms": {}}
        tables[f"{kind}s"][key] = found
        keep(arguments.out, head, tables, fresh=number == 1 and not arguments.only)


def brief(name: str, found: dict[str, Any]) -> str:
    """One line of progress."""
    if "contenders" in found:
        rows, unit = found["contenders"].items(), found.get("unit", PLAIN)
        words = [f"{n} {r['ratio']:.2f}" for n, r in rows if "ratio" in r and n != unit]
        return f"{name}: {unit} {found['contenders'][unit]['median'] * 1e3:.1f} ms; " + ", ".join(
            words
        )
    rates = [
        f"{n} {r['gflops']:.0f} GFLOP/s" if "gflops" in r else f"{n} {r['gbytes']:.1f} GB/s"
        for n, r in found["runs"].items()
    ]
    return f"{name}: " + ", ".join(rates)


if __name__ == "__main__":
    main()
