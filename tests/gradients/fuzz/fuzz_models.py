"""Random models: operations above shared weights, over some steps in which much may change."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from fuzz_operations import HEADS, OPERATIONS, C, Step, Weights
from torch import Tensor

STEPS = 5  # of one model
MODELS = int(os.environ.get("FASTDG_FUZZ_STEPS", "150")) // STEPS
BEGIN = int(os.environ.get("FASTDG_FUZZ_BEGIN", "0"))
GROUP = 10  # models in one test
ASKED = "FASTDG_FUZZ_STEPS" in os.environ or "FASTDG_FUZZ_BEGIN" in os.environ
FIRST = [
    pytest.param(first, marks=[] if ASKED or first == 0 else pytest.mark.matrix)
    for first in range(BEGIN, BEGIN + MODELS, GROUP)
]


@dataclass(frozen=True)
class Case:
    """A model of these operations, by their place, and a head, over some steps."""

    seed: int
    operations: tuple[tuple[int, str], ...]
    head: str
    steps: tuple[int, ...] = tuple(range(STEPS))
    kind: str = ""  # of what is compared

    @classmethod
    def of(cls, seed: int) -> Case:
        choice = random.Random(seed)
        names = [choice.choice(list(OPERATIONS)) for _ in range(choice.randint(1, 5))]
        return cls(seed, tuple(enumerate(names)), choice.choice(list(HEADS)))

    def choice(self, of_what: object) -> random.Random:
        return random.Random(f"{self.seed} {of_what}")


def begin(case: Case, weights: Weights, step: int, gate: bool = True) -> None:
    """Change what differs between steps: the gate, if so, and which weights are frozen."""
    if gate:
        with torch.no_grad():
            weights.gate.fill_(case.choice(f"gate {step}").choice([0.0, 0.0, 0.7]))
    for k, p in enumerate(weights.parameters()):
        p.requires_grad_(case.choice(f"frozen {step // 2} {k}").random() < 0.9)
    weights.matrices[0].requires_grad_(True)


def losses_of(case: Case, weights: Weights, step: int, part: int = 0) -> tuple[Tensor, Tensor]:
    """Losses of one micro-batch of a step, and domains."""
    sizes = case.choice(f"sizes {step // 2} {part}")
    samples, length = sizes.randint(1, 5), sizes.randint(2, 4)
    generator = torch.Generator()
    generator.manual_seed(case.choice(f"values {step} {part}").randrange(1 << 30))
    h = torch.randn(samples, length, C, generator=generator, dtype=torch.float64)
    h = h.to(weights.gate.dtype) @ weights.matrices[0]
    for place, name in case.operations:
        own = f"{case.seed} {place}"
        made = Step(weights, random.Random(own), random.Random(f"{own} {step} {part}"))
        h = h + OPERATIONS[name](made, h).tanh() if place % 2 else OPERATIONS[name](made, h).sin()
    own = f"{case.seed} head"
    made = Step(weights, random.Random(own), random.Random(f"{own} {step} {part}"))
    return HEADS[case.head](made, h), torch.randint(0, 3, (samples,), generator=generator)


Differing = Callable[[Case], str | None]  # what is wrong first in the steps of a model, if anything


def compare(first: int, case_of: Callable[[int], Case], differing: Differing) -> None:
    """Fail with the smallest case of the first model that is wrong."""
    for seed in range(first, min(first + GROUP, BEGIN + MODELS)):
        case = case_of(seed)
        if wrong := differing(case):
            case = _smallest(case, differing)
            pytest.fail(f"{case}: {differing(case) or wrong}")


def _smallest(case: Case, differing: Differing) -> Case:
    """The same fault with as few operations and steps as can be."""
    smaller = True
    while smaller:
        smaller = False
        for k in range(len(case.operations)):
            fewer = replace(case, operations=case.operations[:k] + case.operations[k + 1 :])
            if differing(fewer):
                case, smaller = fewer, True
                break
        for k in range(len(case.steps)):
            fewer = replace(case, steps=case.steps[:k] + case.steps[k + 1 :])
            if differing(fewer):
                case, smaller = fewer, True
                break
    return case
