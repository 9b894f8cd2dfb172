"""Wrappers over several steps of random models: accumulation, freezing, modes, terms that begin
later; always against the algorithm by plain autograd on the same graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fuzz_models import FIRST, Case, begin, compare, losses_of
from fuzz_operations import OPERATIONS, Weights
from fuzz_wrappers import ORACLES, Expected, Oracle, Part
from torch import Tensor
from torch.optim import SGD

ONCE = ("embedding bag",)  # operations that autograd has no second derivative of


def case_of(seed: int) -> Case:
    case = Case.of(seed)
    kind = case.choice("wrapper").choice(list(ORACLES))
    oracle = ORACLES[kind]
    if oracle.head:
        case = replace(case, head=oracle.head)
    if oracle.second:
        kept = tuple((k, name) for k, name in case.operations if name not in ONCE)
        case = replace(case, operations=kept)
    return replace(case, kind=kind)


def parts_of(case: Case, oracle: Oracle, weights: Weights, step: int) -> list[Part]:
    """One to three micro-batches of a step."""
    made = []
    for k in range(case.choice(f"parts {step}").choice([1, 1, 2, 3])):
        losses, domains = losses_of(case, weights, step, k)
        if getattr(oracle, "alone", False):
            domains = torch.full_like(domains, step % 3)
        made.append(Part(losses, domains, weights.logits, weights.labels))
    return made


def differing(case: Case) -> str | None:
    """What is wrong first in the steps of a wrapper, if anything."""
    torch.manual_seed(case.seed)
    weights = Weights()
    oracle = ORACLES[case.kind](case.choice("settings"))
    opt = oracle.wrap(SGD(weights.named_parameters(), lr=1e-3))
    start = None
    for number, step in enumerate(case.steps):
        # Within a meta-iteration of Fish nobody else moves the weights
        begin(case, weights, step, gate=case.kind != "Fish" or number == 0)
        parts = parts_of(case, oracle, weights, step)
        trained = {name: p for name, p in weights.named_parameters() if p.requires_grad}
        expected = oracle.expected(opt, parts, trained)
        try:
            opt.zero_grad()
            for part in parts:
                give = {}
                if case.kind == "IRM" and case.seed % 2:
                    give["logits"] = part.logits
                opt.backward(part.losses, part.domains, final=part is parts[-1], **give)
            if wrong := _wrong(weights, expected):
                return f"step {step}: {wrong}"
            before = {name: p.detach().clone() for name, p in weights.named_parameters()}
            opt.step()
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            return f"step {step}: {type(error).__name__}: {error}"
        if case.kind == "Fish":
            start = before if start is None else start
            if wrong := _moved(weights, oracle, before, start, number):
                return f"step {step}: {wrong}"
            if (number + 1) % oracle.steps == 0:
                start = None
        else:  # a step may lead anywhere
            with torch.no_grad():
                for name, p in weights.named_parameters():
                    p.copy_(before[name])
        oracle.step()
    return None


def _wrong(weights: Weights, expected: Expected) -> str | None:
    tolerance = 1e-5 if weights.rounded else 1e-8
    for name, p in weights.named_parameters():
        if name not in expected.grads:
            if p.grad is not None:
                return f"{name} is frozen and has a gradient"
            continue
        right, got = expected.grads[name], torch.zeros_like(p) if p.grad is None else p.grad
        off = (got - right).abs().masked_fill(got.isnan() & right.isnan(), 0)
        if name in expected.unclear:
            either = (got - expected.or_else.get(name, got)).abs()
            off = torch.where(expected.unclear[name], torch.minimum(off, either), off)
        size = max(1.0, float(right.nan_to_num().abs().max()))
        if not float(off.max()) <= tolerance * size:
            return f"gradient of {name}: off by {float(off.max()):.1e} of {size:.1e}"
    return None


def _moved(
    weights: Weights, oracle: Any, before: dict[str, Tensor], start: dict[str, Tensor], number: int
) -> str | None:
    """The inner step is a plain one, and after the last of them a part of the way is gone."""
    last = (number + 1) % oracle.steps == 0
    for name, p in weights.named_parameters():
        right = before[name] if p.grad is None else before[name] - 1e-3 * p.grad
        if last:
            right = start[name] + oracle.meta_lr * (right - start[name])
        if not torch.allclose(p.detach(), right, rtol=1e-10, atol=1e-12):
            return f"{name} moved to another place"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", FIRST)
def test_random_models_under_wrappers(first: int) -> None:
    compare(first, case_of, differing)


def test_all_wrappers_and_operations_come_up() -> None:
    cases = [case_of(seed) for seed in range(300)]
    assert {case.kind for case in cases} == set(ORACLES)
    assert {name for case in cases for _, name in case.operations} == set(OPERATIONS)
