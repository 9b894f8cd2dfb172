"""Whether a long run stays as small as it began: resident memory of every wrapper over its steps.

    python benchmarks/resident.py --out benchmarks/results/resident.json

The runs are those of the tests (`tests/optim/runs.py`): a small network, so that what a step leaves
behind is seen beside it. Each has a process of its own. What counts is what it holds in memory of
its own (RssAnon), after a collection of garbage and with free memory given back, once the first
steps are over and after each tenth of the rest; Python's objects are counted too.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "optim"))

import torch
from harness import _status, _trim, environment, in_process
from result_files import keep
from runs import RUNS

WARM = 500


def held() -> dict[str, int]:
    """What the process holds now."""
    _trim()
    return {"rss_bytes": _status()["RssAnon"], "objects": len(gc.get_objects())}


def measure(name: str, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    run = RUNS[name]()
    marks = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        run.step()
        if step == WARM or step % max(1, steps // 10) == 0:
            marks.append({"step": step, **held()})
    first, last = marks[0], marks[-1]
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - start, 1),
        "start_bytes": first["rss_bytes"],
        "end_bytes": last["rss_bytes"],
        "grown_bytes": last["rss_bytes"] - first["rss_bytes"],
        "grown_objects": last["objects"] - first["objects"],
        "marks": marks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/resident.json"))
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--only", default="", help="measure these again, keep the others")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the process of one run
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(arguments.run, arguments.steps)))
        return
    head, fresh = environment("python " + " ".join(sys.argv)), not arguments.only
    for name in RUNS:
        if arguments.only in name:
            row = in_process([__file__, "--run", name, "--steps", str(arguments.steps)])
            print(
                f"{name}: {row['start_bytes'] / 2**20:.1f} MiB, {row['grown_bytes'] / 2**10:+.0f} "
                f"KiB, {row['grown_objects']:+d} objects in {row['seconds']:.0f} s",
                file=sys.stderr,
            )
            keep(arguments.out, head, {"runs": {name: row}}, fresh)
            fresh = False


if __name__ == "__main__":
    main()
