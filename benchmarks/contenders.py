"""What a row of the tables is made of: a question, and who answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peers
import torch
from models import SPECS, Problem, problem
from torch import Tensor

import fastdg

Run = Callable[[], Any]
PLAIN, OURS, REFERENCE = "plain", "fastdg", "fastdg, reference backend"
FLOOR = "copy of the same bytes"  # where the floor is something to run
# Largest relative error (norm, worst parameter) against float64 per-sample gradients that is timed.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Contender:
    """One way to answer.

    Attributes:
        make: settings of this contender and a problem of its own -> what to run.
        settings: values to try; the fastest is measured.
        result: the numbers to verify, from the problem and what the first run returned; None if
            there is nothing to verify.
        needs: a package that may be missing.
        slow: not part of the smoke run (compilers).
    """

    make: Callable[..., Run]
    settings: tuple[Any, ...] = ()
    result: Callable[[Any, Any], Mapping[str, Tensor]] | None = lambda problem, out: out
    needs: str | None = None
    slow: bool = False

    @property
    def middle(self) -> Any:
        """The setting to take where there is no time to try them all."""
        return self.settings[len(self.settings) // 2] if self.settings else None

    def unavailable(self) -> str | None:
        return peers.missing(self.needs) if self.needs else None

    def start(self, on: Any, setting: Any = None) -> Run:
        return self.make(on) if setting is None else self.make(on, setting)


@dataclass(frozen=True)
class Case:
    """One row: a model, a batch, a plain step, a floor, and the contenders.

    ``floor`` is None where a contender named FLOOR is it.
    """

    question: str
    model: str
    samples: int
    contenders: dict[str, Contender]
    truth: Callable[[Any], Mapping[str, Tensor]]
    floor: Callable[[Any], float] | None
    reach: float
    features_given: bool = False
    tolerance: float = TOLERANCE
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.question}/{self.model}"

    @property
    def title(self) -> str:
        return f"{SPECS[self.model].title}, N={self.samples}"

    def problem(self, samples: int | None = None, name: str | None = None) -> Any:
        return self._problem(name or self.model, samples, torch.float32)

    def exact(self, samples: int | None = None) -> Any:
        """The same problem in float64, for the truth."""
        return self._problem(self.model, samples, torch.float64)

    def _problem(self, name: str, samples: int | None, dtype: torch.dtype) -> Problem:
        made = problem(name, samples or self.samples, dtype)
        made.x.requires_grad_(self.features_given)
        return made


def error(result: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Largest relative error over the parameters, by norm; parameters without a gradient aside."""
    largest = max(t.norm().item() for t in truth.values())
    errors = [0.0]
    for name, t in truth.items():
        if t.norm().item() > 1e-9 * largest:
            errors.append(((result[name].double() - t).norm() / t.norm()).item())
    return max(errors)


def verified(case: Case, contender: Contender, run: Run, on: Any, truth: Any) -> dict[str, Any]:
    """Run once and compare: ``error``, if there is anything to verify; raises when it is wrong."""
    out = run()
    if contender.result is None:
        return {}
    wrong = error(contender.result(on, out), truth)
    if not wrong <= case.tolerance:
        raise ArithmeticError(f"relative error {wrong:.1e} against float64")
    return {"error": wrong}


def reference(make: Callable[[Any], Run]) -> Callable[[Any], Run]:
    """The same on the plain-PyTorch implementation of the ops."""

    def made(on: Any) -> Run:
        run = make(on)

        def forced() -> Any:
            with fastdg.use_backend("reference"):
                return run()

        return forced

    return made


def ours(make: Callable[[Any], Run], **more: Any) -> dict[str, Contender]:
    found = {OURS: Contender(make, **more)}
    if fastdg.backends()["cpp"][0]:
        found[REFERENCE] = Contender(reference(make), **more)
    return found
