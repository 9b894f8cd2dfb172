"""Random models in float32, in bfloat16 and under autocast, against themselves in float64.

Statistics and wrappers may be a few times as far from the truth as plain autograd is on the same
graph, which is what the dtype does to this model, and a few roundings beyond.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fuzz_models import FIRST, Case, begin, compare, losses_of
from fuzz_operations import Weights
from fuzz_wrappers import ORACLES, Part
from oracle import naive_moments, one_by_one, scalar_of
from torch import Tensor
from torch.optim import SGD

import fastdg

ONCE = ("embedding bag",)
SMOOTH = ("ERM", "PCGrad", "VREx", "GroupDRO", "IRM", "IGA", "Fishr")  # those without signs
DTYPES = ("float32", "bfloat16", "autocast")
TIMES, ROUNDINGS, READABLE = 4, 8, 0.1
Found = dict[str, tuple[Tensor, float]]  # what it is -> values, and how large its parts are


@dataclass
class Counted:
    """How many steps told something, and how many did not: too much was lost by the dtype."""

    told: int = 0
    lost: int = 0


COUNT = Counted()


def case_of(seed: int) -> Case:
    case = Case.of(seed)
    choice = case.choice("dtype")
    kind = choice.choice(["statistics", "statistics", choice.choice(SMOOTH)])
    if kind != "statistics":
        case = replace(case, head=ORACLES[kind].head or case.head)
    kept = tuple((k, name) for k, name in case.operations if name not in ONCE)
    return replace(case, operations=kept, kind=f"{kind} {choice.choice(DTYPES)}")


def differing(case: Case) -> str | None:
    """What is wrong first in the steps of a model, if anything."""
    what, dtype = case.kind.split()
    torch.manual_seed(case.seed)
    weights = Weights().to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    oracles, opt = [], None
    if what != "statistics":
        oracles = [ORACLES[what](case.choice("settings")) for _ in range(3)]
        opts = [o.wrap(SGD(weights.named_parameters(), lr=1e-3)) for o in oracles]
        opt = opts[0]
    for step in case.steps:
        begin(case, weights, step)
        weights.logits = weights.labels = None
        exact = copy.deepcopy(weights).double()
        before = {name: p.detach().clone() for name, p in weights.named_parameters()}
        try:
            parts = _parts(case, weights, step, dtype == "autocast")
        except RuntimeError:  # the model itself does not run in this dtype
            return None
        true_parts = _parts(case, exact, step, False)
        if what == "statistics":
            plain, truth = (
                _statistics(p, w, step) for p, w in ((parts, weights), (true_parts, exact))
            )
        else:
            plain, truth = (
                _expected(o, opt, p, w)
                for o, p, w in ((oracles[1], parts, weights), (oracles[2], true_parts, exact))
            )
        try:
            got = _of_fastdg(parts, weights, step) if opt is None else _of_wrapper(opt, parts)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            return f"step {step}: {type(error).__name__}: {error}"
        if wrong := _wrong(got, plain, truth, dtype):
            return f"step {step}: {wrong}"
        if opt is not None:
            opt.step()
        for oracle in oracles[1:]:
            oracle.step()
        with torch.no_grad():
            for name, p in weights.named_parameters():
                p.copy_(before[name])
    return None


def _parts(case: Case, weights: Weights, step: int, autocast: bool) -> list[Part]:
    made = []
    for k in range(1 + step % 2 if "statistics" not in case.kind else 1):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            losses, domains = losses_of(case, weights, step, k)
        made.append(Part(losses, domains, weights.logits, weights.labels))
    return made


def _trained(weights: Weights) -> dict[str, Tensor]:
    return {name: p for name, p in weights.named_parameters() if p.requires_grad}


def _size(*tensors: Tensor) -> float:
    return max((float(x.detach().abs().max()) for x in tensors), default=0.0)


def _statistics(parts: list[Part], weights: Weights, step: int) -> Found:
    (part,), named, twice = parts, _trained(weights), step % 2 == 1
    rows = one_by_one(part.losses, named, twice)
    each = {n: g if g.dtype == torch.float64 else g.float() for n, g in rows.items()}
    mean, variance = naive_moments(each, part.domains, 3)
    found: Found = {}
    for name, g in each.items():
        found[f"mean of {name}"] = mean[name], _size(g)
        found[f"variance of {name}"] = variance[name], _size(g) ** 2
    squares = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in each.values()]).sum(0)
    found["norms"] = squares.sqrt(), _size(squares.sqrt())
    if twice:
        # Of the gradients of a domain that are equal nothing but what they round to is left
        found |= _derivatives(variance, named, max(_size(g) for g in each.values()) ** 2)
    return found


def _derivatives(
    variance: dict[str, Tensor], named: dict[str, Tensor], least: float = 0.0
) -> Found:
    total = scalar_of(variance) + sum(p.sum() * 0 for p in named.values())
    grads = torch.autograd.grad(
        total, list(named.values()), retain_graph=True, materialize_grads=True
    )
    return {
        f"derivative of {n}": (g, max(least, _size(g))) for n, g in zip(named, grads, strict=True)
    }


def _of_fastdg(parts: list[Part], weights: Weights, step: int) -> Found:
    (part,), named, twice = parts, _trained(weights), step % 2 == 1
    given: dict[str, Any] = {"params": named, "num_domains": 3}
    gradients = fastdg.domain_gradients(part.losses, part.domains, **given)
    norms = fastdg.per_sample_norms(part.losses, params=named)
    moments = fastdg.domain_moments(part.losses, part.domains, create_graph=twice, **given)
    found: Found = {"norms": (norms, 0.0)}
    zeros = {name: torch.zeros(3, *p.shape) for name, p in named.items()}
    variance = {name: moments.variance.get(name, zeros[name]) for name in named}
    for name in named:
        both = moments.mean.get(name, zeros[name]), gradients.get(name, zeros[name])
        found[f"mean of {name}"] = torch.stack(both), 0.0
        found[f"variance of {name}"] = variance[name], 0.0
    return found | (_derivatives(variance, named) if twice else {})


def _expected(oracle: Any, opt: Any, parts: list[Part], weights: Weights) -> Found:
    grads = oracle.expected(opt, parts, _trained(weights)).grads
    return {name: (g, _size(g)) for name, g in grads.items()}


def _of_wrapper(opt: Any, parts: list[Part]) -> Found:
    opt.zero_grad()
    for part in parts:
        give = {"logits": part.logits} if isinstance(opt, fastdg.IRM) else {}
        opt.backward(part.losses, part.domains, final=part is parts[-1], **give)
    named = {name: p for p, name in opt._names.items() if p.requires_grad}
    zeros = {name: torch.zeros_like(p) for name, p in named.items()}
    return {n: (zeros[n] if p.grad is None else p.grad, 0.0) for n, p in named.items()}


def _wrong(got: Found, plain: Found, truth: Found, dtype: str) -> str | None:
    """None, too, where the dtype leaves nothing to compare."""
    kinds = {name.partition(" ")[0] if " of " in name else "" for name in truth}
    largest = {
        kind: max(size for name, (_, size) in truth.items() if name.startswith(kind))
        for kind in kinds
    }
    eps = torch.finfo(torch.float32 if dtype == "float32" else torch.bfloat16).eps
    sizes, noise = {}, 0.0
    for name, (right, size) in truth.items():
        kind = name.partition(" ")[0] if " of " in name else ""
        sizes[name] = max(size, plain[name][1], 0.01 * largest[kind], 1e-6)
        off = _size(plain[name][0].double() - right)
        noise = max(noise, off / sizes[name] if math.isfinite(off) else math.inf)
    if noise > READABLE:
        COUNT.lost += 1
        return None
    COUNT.told += 1
    assert got.keys() == truth.keys()
    for name, (right, _) in truth.items():
        off = _size(got[name][0].double() - right) / sizes[name]
        if not off <= TIMES * noise + ROUNDINGS * eps:
            return f"{name}: off by {off:.1e} of its size, plain autograd by {noise:.1e}"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", FIRST)
def test_random_models_in_other_dtypes(first: int) -> None:
    compare(first, case_of, differing)


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
def test_most_steps_tell_something(dtype: str) -> None:
    COUNT.told = COUNT.lost = 0
    for seed in range(12):
        differing(replace(case_of(seed), kind=f"statistics {dtype}"))
    assert COUNT.told > COUNT.lost
