"""The truth in float64, one plain backward a sample, and the statistics of fastdg beside it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from oracle import one_by_one, trainable
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo_cases import Case, losses_of

import fastdg

DOMAINS = torch.tensor([0, 2, 0, 1, 0, 2])  # ragged: of 3, 1 and 2 samples
NUM_DOMAINS = 3
TOLERANCE = 1e-8
# A gradient this small beside the largest of the model is compared with that one: of some, as of a
# bias before a batch norm, nothing but rounding is there.
FLOOR = 1e-4


class Result(NamedTuple):
    """Of a case in a mode.

    Attributes:
        parameters: how many of the model's get a gradient.
        rules, pulled, slow: how many of them are served by a rule, by a rule and a backward of what
            makes the tensor, and by a call for each domain or sample.
        small: how many have gradients below the floor, up to which they are then compared.
        worst: the largest relative error.
        where: the statistic and the parameter of that error.
        seconds: of everything.
    """

    parameters: int
    rules: int
    pulled: int
    slow: int
    small: int
    worst: float
    where: str
    seconds: float

    @property
    def wrong(self) -> bool:
        return not self.worst <= TOLERANCE  # NaN is wrong


class InFloat64(TorchFunctionMode):
    """What a model casts to float32, as many a norm does, stays in float64: so that what differs
    is no rounding."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        given = (kwargs or {}).items()
        return func(*args, **{k: torch.float64 if a is torch.float32 else a for k, a in given})


def served(losses: Tensor, model: nn.Module) -> tuple[int, int, int]:
    """How many parameters are served by rules, pulled, and slow."""
    rules = pulled = slow = 0
    for row in fastdg.explain(losses, model).rows:
        if row.way == "rule":
            rules += 1
        elif row.cost.startswith("as by a rule"):
            pulled += 1
        else:
            slow += 1
    return rules, pulled, slow


def error_of(got: Tensor, expected: Tensor, size: float) -> float:
    """Norm of the difference, relative to ``size``."""
    if got.shape != expected.shape:
        return float("inf")
    error = float((got - expected).norm())
    return error / size if size > 0 else error


def compare(losses: Tensor, model: nn.Module) -> tuple[float, str, int, int]:
    """The largest relative error and where, how many parameters have gradients, and how many of
    these are below the floor."""
    truth = one_by_one(losses, trainable(model))
    if not all(bool(g.isfinite().all()) for g in truth.values()):
        raise NotHere("plain autograd's gradients are not finite")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "params: .* one call of autograd", UserWarning)
        by_domain = fastdg.domain_gradients(losses, DOMAINS, params=model, num_domains=NUM_DOMAINS)
        moments = fastdg.domain_moments(losses, DOMAINS, params=model, num_domains=NUM_DOMAINS)
        norms = fastdg.per_sample_norms(losses, params=model)
    largest = max(float(g.norm()) for g in truth.values())
    squares = torch.stack([g.square().flatten(1).sum(1) for g in truth.values()]).sum(0)
    errors = [(error_of(norms, squares.sqrt(), float(squares.sum().sqrt())), "norms")]
    floor, small = FLOOR * largest, 0
    for name, g in truth.items():
        if name not in by_domain:
            errors.append((float(bool(g.any())), f"{name} is missing"))
            continue
        small += float(g.norm()) < floor
        # The size of all samples' gradients: they may cancel, and so may their deviations.
        size = max(float(g.norm()), floor)
        for kind, got, expected in statistics(name, g, by_domain[name], moments):
            relative = error_of(got, expected, size**2 if kind == "variance" else size)
            errors.append((relative, f"{kind} of {name}"))
    worst = max(errors, key=lambda e: (e[0] != e[0], e[0]))
    return (*worst, len(by_domain), small)


def statistics(
    name: str, g: Tensor, by_domain: Tensor, moments: fastdg.DomainMoments
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """``(statistic, got, expected)`` of a parameter with per-sample gradients ``g``."""
    rows = [g[domain == DOMAINS] for domain in range(NUM_DOMAINS)]
    mean = torch.stack([r.mean(0) for r in rows])
    yield "domain gradient", by_domain, mean
    yield "mean", moments.mean[name], mean
    variance = [(r - m).square().mean(0) for r, m in zip(rows, mean, strict=True)]
    yield "variance", moments.variance[name], torch.stack(variance)


def run(case: Case, training: bool) -> Result:
    """Compare a case's statistics in float64.

    Raises:
        NotHere: the model cannot be made or run here, or its gradients are not finite.
    """
    start = time.perf_counter()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        try:
            model, forward = case.make()
            model.double().train(training)
            with InFloat64():
                losses = losses_of(forward(), case.axis)
            if not losses.requires_grad:
                raise ValueError("its losses have no graph")
        except Exception as error:
            raise NotHere(f"{type(error).__name__}: {error}") from error
        counts = served(losses, model)
        worst, where, parameters, small = compare(losses, model)
    finally:
        torch.set_default_dtype(before)
    seconds = time.perf_counter() - start
    return Result(parameters, *counts, small, worst, where, seconds)


class NotHere(Exception):
    """A model that cannot be made here, and why."""
