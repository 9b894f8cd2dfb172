"""One contender of one case under pytest-benchmark."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from cases import Case, verified
from models import problem

# Two samples a domain: enough to run every line.
SMOKE_SAMPLES = 6
SECONDS = 1.5
# A contender whose first run took longer than this is verified, and timed in measure.py only.
PATIENCE = 6.0


def parameters(cases: list[Case]) -> pytest.MarkDecorator:
    """Every (case, contender)."""
    pairs = [
        pytest.param(case, name, id=f"{case.key}-{name}")
        for case in cases
        for name in case.contenders
    ]
    return pytest.mark.parametrize("case, name", pairs)


def answer(benchmark: Any, case: Case, name: str, smoke: bool, truths: dict[Any, Any]) -> None:
    """Verify against float64 per-sample gradients, then time.

    Groups are cases: within one, the plain step is the row to divide by, and the floor stands in
    the extra information.
    """
    contender = case.contenders[name]
    if (reason := contender.unavailable()) is not None:
        pytest.skip(reason)
    if smoke and contender.slow:
        pytest.skip("compiles; not part of the smoke run")
    samples = SMOKE_SAMPLES if smoke else case.samples
    if case.key not in truths:
        exact = problem(case.model, samples, torch.float64)
        exact.x.requires_grad_(case.features_given)
        truths.clear()  # one case at a time
        truths[case.key] = dict(case.truth(exact))
    on = case.problem(samples)
    benchmark.group = f"{case.question}: {case.title}"
    benchmark.extra_info["floor"] = case.floor(case.problem(samples))
    try:
        run = contender.start(on, contender.middle)
        start = time.perf_counter()
        benchmark.extra_info.update(verified(case, contender, run, on, truths[case.key]))
    except NotImplementedError as refused:
        pytest.skip(f"not possible: {refused}")
    seconds = time.perf_counter() - start
    if seconds > PATIENCE and not smoke:
        pytest.skip(f"verified; a run takes {seconds:.0f} s: see benchmarks/measure.py")
    if seconds < SECONDS:  # the first run and its verification say little of a short one
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    rounds = 1 if smoke else max(1, min(50, int(SECONDS / seconds)))
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=0 if rounds == 1 else 1)
