"""The truth in float64, one plain backward a sample, and the statistics and steps of fastdg beside
it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import zoo_steps
from oracle import one_by_one, trainable
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from zoo_cases import Case, losses_of

import fastdg
from fastdg.gradients.engine import plan_gradients

DOMAINS = torch.tensor([0, 2, 0, 1, 0, 2])  # ragged: of 3, 1 and 2 samples
NUM_DOMAINS = 3
TOLERANCE = 1e-8
# A gradient this small beside the largest of the model is compared with that one: of some, as of a
# bias before a batch norm, nothing but rounding is there.
FLOOR = 1e-4
NOT_RUN = "not run"


class Result(NamedTuple):
    """Of a case in a mode.

    Attributes:
        parameters: how many of the model's get a gradient.
        rules, chained, slow: numbers of parameters with a rule, with a rule and a backward of what
            makes the tensor, and by a call for each domain or sample.
        slow_at: the operations that are called so.
        small: how many have gradients below the floor, up to which they are then compared.
        errors: the largest relative error of the statistics and of each algorithm's step; of a step
            that autograd itself cannot make, why.
        where: the statistic or step and the parameter of the largest error.
    """

    parameters: int
    rules: int
    chained: int
    slow: int
    slow_at: list[str]
    small: int
    errors: dict[str, float | str]
    where: str

    @property
    def wrong(self) -> bool:
        numbers = [e for e in self.errors.values() if not isinstance(e, str)]
        return not all(e <= TOLERANCE for e in numbers)  # NaN is wrong


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


class Forwards:
    """Forwards of a model that are the same each time. Each is of a model made anew: some keep what
    they have computed, with its graph.

    Args:
        case: which makes the model.
        training: its mode.
    """

    model: nn.Module  # of the last forward

    def __init__(self, case: Case, training: bool) -> None:
        self.case, self.training = case, training
        self.first: Tensor | None = None

    def losses(self, second_derivatives: bool = False) -> Tensor:
        """Of a new forward; without fused attention, which has no second derivative, if asked."""
        random.seed(0)
        torch.manual_seed(0)
        self.model, forward = self.case.make()
        self.model.double().train(self.training)
        attention = sdpa_kernel(SDPBackend.MATH) if second_derivatives else nullcontext()
        with InFloat64(), attention:
            losses = losses_of(forward(), self.case.axis)
        if not losses.requires_grad:
            raise ValueError("its losses have no graph")
        if self.first is None:
            self.first = losses.detach()
        elif not torch.allclose(losses, self.first, rtol=1e-9, atol=0):
            raise ValueError("a second forward gives other losses")
        return losses

    def stepped(self, make: Callable[..., Any], losses: Tensor) -> dict[str, Tensor | None]:
        """``.grad`` after a backward of the algorithm, as it was before hooks of parameters."""
        with hooks_at_rest(self.model):
            return zoo_steps.stepped(make, self.model, losses, DOMAINS)


def counts_by_way(losses: Tensor, model: nn.Module) -> tuple[int, int, int, list[str]]:
    """Count the parameters with a rule, chained and slow ones; name the operations of the slow."""
    rules = chained = slow = 0
    for row in fastdg.explain(losses, model).rows:
        if row.way == "rule":
            rules += 1
        elif row.cost.startswith("as by a rule"):
            chained += 1
        else:
            slow += 1
    found = plan_gradients(losses, trainable(model)).plan.slow
    mixed = (" below which samples are mixed" if b.mixed else "" for b in found)
    at = {b.operation.partition("Backward")[0] + m for b, m in zip(found, mixed, strict=True)}
    return rules, chained, slow, sorted(at)


def error_of(got: Tensor, expected: Tensor, size: float) -> float:
    """Norm of the difference, relative to ``size``."""
    if got.shape != expected.shape:
        return float("inf")
    error = float((got - expected).norm())
    return error / size if size > 0 else error


Errors = list[tuple[float, str]]  # and the statistic and parameter of each


def of_statistics(losses: Tensor, model: nn.Module, truth: Mapping[str, Tensor]) -> Errors:
    """The relative errors of the domains' gradients and moments, and of the samples' norms."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "params: .* one call of autograd", UserWarning)
        by_domain = fastdg.domain_gradients(losses, DOMAINS, params=model, num_domains=NUM_DOMAINS)
        moments = fastdg.domain_moments(losses, DOMAINS, params=model, num_domains=NUM_DOMAINS)
        norms = fastdg.per_sample_norms(losses, params=model)
    squares = torch.stack([g.square().flatten(1).sum(1) for g in truth.values()]).sum(0)
    errors = [(error_of(norms, squares.sqrt(), float(squares.sum().sqrt())), "norms")]
    for name, size in sizes(truth).items():
        if name not in by_domain:
            errors.append((float(bool(truth[name].any())), f"{name} is missing"))
            continue
        for kind, got, expected in statistics(truth[name], by_domain[name], moments, name):
            relative = error_of(got, expected, size**2 if kind == "variance" else size)
            errors.append((relative, f"{kind} of {name}"))
    return errors


def sizes(truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The size that an error of each parameter is relative to, that of all samples' gradients: they
    may cancel, and so may their deviations."""
    norms = {name: float(g.norm()) for name, g in truth.items()}
    floor = FLOOR * max(norms.values())
    return {name: max(norm, floor) for name, norm in norms.items()}


def statistics(
    g: Tensor, by_domain: Tensor, moments: fastdg.DomainMoments, name: str
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """``(statistic, got, expected)`` of a parameter with per-sample gradients ``g``."""
    rows = [g[domain == DOMAINS] for domain in range(NUM_DOMAINS)]
    mean = torch.stack([r.mean(0) for r in rows])
    yield "domain gradient", by_domain, mean
    yield "mean", moments.mean[name], mean
    variance = [(r - m).square().mean(0) for r, m in zip(rows, mean, strict=True)]
    yield "variance", moments.variance[name], torch.stack(variance)


def of_surgery(forwards: Forwards, truth: Mapping[str, Tensor]) -> dict[str, Errors]:
    """The relative errors of PCGrad's and AgrSum's gradients."""
    size, errors = sizes(truth), dict[str, Errors]()
    expected = zoo_steps.pcgrad(zoo_steps.domain_means(truth, DOMAINS))
    got = forwards.stepped(zoo_steps.pcgrad_of_fastdg, forwards.losses())
    errors["PCGrad"] = [
        (error_of(there(got[name], g), g, size[name]), f"PCGrad of {name}")
        for name, g in expected.items()
    ]
    got = forwards.stepped(fastdg.AgrSum, forwards.losses())
    errors["AgrSum"] = []
    for name, g in truth.items():
        grad = there(got[name], g[0])
        away = zoo_steps.agrsum_error(grad, g, DOMAINS, size[name], TOLERANCE)
        relative = error_of(away, torch.zeros_like(away), size[name])
        errors["AgrSum"].append((relative, f"AgrSum of {name}"))
    return errors


def of_fishr(forwards: Forwards, truth: Mapping[str, Tensor]) -> Errors:
    """The relative errors of Fishr's gradient, with a penalty whose part of it is as large as that
    of the mean loss.

    Raises:
        RuntimeError: autograd has no second derivative of the model.
    """
    losses = forwards.losses(second_derivatives=True)
    named = trainable(forwards.model)
    with hooks_at_rest(forwards.model):
        wanted = torch.autograd.grad(
            losses.sum(), list(named.values()), retain_graph=True, allow_unused=True
        )
        used = {name: truth[name] for name, g in zip(named, wanted, strict=True) if g is not None}
        penalty = zoo_steps.fishr(losses, used, named, DOMAINS)
    mean = {name: g.mean(0) for name, g in truth.items()}
    total = [float(torch.stack([g.norm() for g in x.values()]).norm()) for x in (mean, penalty)]
    weight = total[0] / total[1] if total[0] > 0 and total[1] > 0 else 1.0
    got = forwards.stepped(zoo_steps.fishr_of_fastdg(weight), losses)
    size = {
        name: max(float(truth[name].norm()) / len(losses), weight * float(penalty[name].norm()))
        for name in named
    }
    floor = FLOOR * max(size.values())
    return [
        (
            error_of(there(got[name], g), g + weight * penalty[name], max(size[name], floor)),
            f"Fishr of {name}",
        )
        for name, g in mean.items()
    ]


@contextmanager
def hooks_at_rest(model: nn.Module) -> Iterator[None]:
    """What hooks of parameters do, as OSF's, comes after every statistic and algorithm."""
    tables = [p._backward_hooks for p in model.parameters() if p._backward_hooks]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def there(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient; zeros for None, as of a parameter without a use."""
    if grad is None:
        return torch.zeros_like(like)
    return grad.to_dense() if grad.is_sparse else grad


def largest(errors: Errors) -> tuple[float, str]:
    return max(errors, key=lambda e: (e[0] != e[0], e[0]))


def run(case: Case, training: bool, fishr: bool = True) -> Result:
    """Compare a case's statistics and steps in float64.

    Args:
        case: the model.
        training: its mode.
        fishr: take Fishr's step too, which is half of the work.

    Raises:
        NotHere: the model cannot be made or run here, or its gradients are not finite.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        try:
            forwards = Forwards(case, training)
            losses = forwards.losses()
        except TimeoutError:
            raise
        except Exception as error:
            raise NotHere(f"{type(error).__name__}: {error}") from error
        return compared(forwards, losses, fishr)
    finally:
        torch.set_default_dtype(before)


def compared(forwards: Forwards, losses: Tensor, fishr: bool) -> Result:
    """The result of a model."""
    model = forwards.model
    rules, chained, slow, slow_at = counts_by_way(losses, model)
    with hooks_at_rest(model):
        truth = one_by_one(losses, trainable(model))
    if not all(bool(g.isfinite().all()) for g in truth.values()):
        raise NotHere("plain autograd's gradients are not finite")
    found = {"statistics": of_statistics(losses, model, truth)}
    del losses
    errors: dict[str, float | str] = {}
    try:
        found |= of_surgery(forwards, truth)
        if fishr:
            found["Fishr"] = of_fishr(forwards, truth)
        else:
            errors["Fishr"] = NOT_RUN
    except RuntimeError as error:
        if (operation := zoo_steps.without_second_derivative(error)) is None:
            raise
        errors["Fishr"] = f"none: {operation}"
    errors = {kind: largest(of_kind)[0] for kind, of_kind in found.items()} | errors
    norms = {name: float(g.norm()) for name, g in truth.items()}
    small = sum(norm < FLOOR * max(norms.values()) for norm in norms.values())
    where = largest([e for of_kind in found.values() for e in of_kind])[1]
    return Result(rules + chained + slow, rules, chained, slow, slow_at, small, errors, where)


class NotHere(Exception):
    """A model that cannot be made here, and why."""
