"""Rows of whole steps: time in turns with plain training, peak memory, launches, waits, capture."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peers
from gpu_models import FULL, NETWORKS, SMALL
from gpu_peers import PEERS
from gpu_rig import Rig, Row, Run
from gpu_steps import INNER, PLAIN, PRECISIONS, STEPS, Training, set_precision, training

# A plan is looked at anew at steps 1, 2, 4 and 8, which reads values: not at the next ones
SETTLED = 4
ORDER = ("bf16", "tf32", "fp32")
assert set(ORDER) == set(PRECISIONS)


def made(rig: Rig, step: str, name: str, precision: str) -> Run:
    on = training(step, name, SMALL if rig.small else FULL, precision, rig.device)
    return maker(step)(on)


def maker(step: str) -> Callable[[Training], Run]:
    return STEPS[step] if step in STEPS else PEERS[step][1]


def timed_row(rig: Rig, step: str, name: str, precision: str) -> Row:
    """A step in turns with plain training, whose network no wrapper has ever touched."""
    set_precision(precision)
    if step in PEERS and (package := PEERS[step][0]) and (why := peers.missing(package)):
        return {"missing": why}
    try:
        ours = made(rig, step, name, precision)
    except NotImplementedError as error:
        if step not in PEERS:
            raise
        return {"missing": f"refused: {error}".splitlines()[0][:300]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(SETTLED):
            ours()
    row: Row = {"peak GB": 1e-9 * rig.peak_bytes(ours), "launches": rig.launches(ours)}
    unit = INNER if step == "Fish" else PLAIN
    runs = (
        {"step": ours} if step == unit else {"step": ours, unit: made(rig, unit, name, precision)}
    )
    ms = rig.time_ms(runs)
    row |= {"ms": ms["step"], "turns": rig.turns}
    if unit in ms:
        row |= {"unit": unit, "unit ms": ms[unit], "ratio": ms["step"] / ms[unit]}
    if words := sorted({str(w.message)[:300] for w in told}):
        row["warned"] = words
    return row


def sync_row(rig: Rig, step: str, name: str) -> Row:
    """Whether a settled step waits for the device anywhere."""
    set_precision("tf32")
    run = made(rig, step, name, "bf16")
    for _ in range(SETTLED):
        run()
    rig.wait()
    try:
        with rig.no_sync():
            run()
    except RuntimeError as error:
        return {"waits": str(error).splitlines()[0][:300]}
    return {"waits": "nowhere"}


def capture_row(rig: Rig, step: str, name: str, before: int) -> Row:
    """A CUDA graph of a step, after ``before`` ordinary ones; in a process of its own, as a capture
    that fails can break its process."""
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "one-capture"]
    command += ["--out", str(rig.out), "--device", rig.device, *(["--small"] * rig.small)]
    command += ["--only", f"{step}|{name}|{before}"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = (child.stdout + child.stderr).strip().splitlines() or ["nothing"]
    if child.returncode == 0:
        return {"capture": said[-1]}
    return {"capture": "failed", "said": said[-12:]}


def one_capture(rig: Rig) -> int:
    step, name, before = rig.only.split("|")
    set_precision("tf32")
    run = made(rig, step, name, "bf16")
    for _ in range(int(before)):
        run()
    rig.wait()
    with rig.capturing():
        run()
    rig.wait()
    print("works" if rig.device == "cuda" else "ran; the CPU has no graphs")
    return 0


def run(rig: Rig) -> int:
    todo: dict[str, Callable[[], Row]] = {}
    for precision in ORDER:
        for name in NETWORKS:
            for step in [*STEPS, *PEERS]:
                key = f"{name}, {precision}: {step}"
                todo[key] = partial(timed_row, rig, step, name, precision)
    return rig.fill("steps", todo)


def waits(rig: Rig) -> int:
    todo: dict[str, Callable[[], Row]] = {}
    for name in NETWORKS:
        for step in STEPS:
            todo[f"waits: {name}: {step}"] = partial(sync_row, rig, step, name)
        for step in ("AgrSum", "Fishr(head)"):
            for before in (0, SETTLED):
                key = f"capture after {before} steps: {name}: {step}"
                todo[key] = partial(capture_row, rig, step, name, before)
    return rig.fill("waits", todo)


def keys() -> Any:
    """Names of the rows of `run`, for the table."""
    return [(name, precision, step) for name in NETWORKS for precision in ORDER for step in STEPS]
