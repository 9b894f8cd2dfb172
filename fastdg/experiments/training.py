"""One run of an algorithm on a task with one domain left out, selected as DomainBed selects."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .. import Fishr, domain_moments, record
from ..data.digits import Task

BATCH = 32  # of each training domain
LEARNING_RATE = 1e-3
EVALUATIONS = 15


@dataclass(frozen=True)
class Algorithm:
    """How a run makes its optimizer: from (base, domains, steps), or plain training if None."""

    title: str
    wrap: Callable[[Optimizer, int, int], Fishr] | None = None


def _fishr(params: str) -> Callable[[Optimizer, int, int], Fishr]:
    def wrap(base: Optimizer, domains: int, steps: int) -> Fishr:
        # DomainBed's defaults, its anneal (1500 of 5001 steps) in proportion.
        anneal = round(0.3 * steps)
        return Fishr(base, params=params, anneal_steps=anneal, num_domains=domains)

    return wrap


ALGORITHMS = {
    "erm": Algorithm("ERM"),
    "fishr-head": Algorithm("Fishr, head", _fishr("head")),
    "fishr-all": Algorithm("Fishr, all", _fishr("all")),
}


def network(channels: int, classes: int, seed: int) -> nn.Sequential:
    """Two convolutions and two linear layers; no statistics over the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, classes),
        )


def train(task: Task, algorithm: str, left_out: int, seed: int, steps: int) -> dict[str, Any]:
    """Train on all domains but one.

    Each training domain is split 80:20; the checkpoint with the best mean accuracy on the 20 %
    parts is kept,
    and its accuracy on the whole of the domain left out is the result. Deterministic in its
    arguments.

    Returns:
        ``accuracy`` (per cent on the domain left out), ``chosen_step``, ``step_seconds`` (median),
        ``peak_bytes`` (of this run, or None), and ``curve``: at each evaluation the step, both
        accuracies, the loss, and the head's mean gradient variance in each training domain.
    """
    generator = torch.Generator().manual_seed(1000 * seed + left_out)
    chosen = [d for d in range(len(task.domains)) if d != left_out]
    fit, held = [], []
    for d in chosen:
        order = torch.randperm(len(task.labels[d]), generator=generator)
        cut = round(0.8 * len(order))
        fit.append((task.images[d][order[:cut]], task.labels[d][order[:cut]]))
        held.append((task.images[d][order[cut:]], task.labels[d][order[cut:]]))
    model = network(task.images[0].shape[1], task.classes, seed)
    base = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    wrap = ALGORITHMS[algorithm].wrap
    opt = wrap(base, len(chosen), steps) if wrap else base
    domains = torch.arange(len(chosen)).repeat_interleave(BATCH)
    every = max(1, steps // EVALUATIONS)
    curve: list[dict[str, Any]] = []
    seconds: list[float] = []
    floor = _reset_peak()
    for count in range(1, steps + 1):
        rows = [torch.randint(len(y), (BATCH,), generator=generator) for _, y in fit]
        x = torch.cat([part[0][r] for part, r in zip(fit, rows, strict=True)])
        y = torch.cat([part[1][r] for part, r in zip(fit, rows, strict=True)])
        began = time.perf_counter()
        opt.zero_grad()
        if isinstance(opt, Fishr):
            loss = opt.backward(F.cross_entropy(model(x), y, reduction="none"), domains)
        else:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        opt.step()
        seconds.append(time.perf_counter() - began)
        if count % every == 0 or count == steps:
            curve.append(
                {
                    "step": count,
                    "loss": float(loss.detach()),
                    "validation": statistics.fmean(accuracy(model, *part) for part in held),
                    "test": accuracy(model, task.images[left_out], task.labels[left_out]),
                    "variance": head_variance(model, fit),
                }
            )
    best = max(curve, key=lambda point: point["validation"])
    return {
        "accuracy": best["test"],
        "chosen_step": best["step"],
        "step_seconds": statistics.median(seconds),
        "peak_bytes": _peak(floor),
        "curve": curve,
    }


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    return 100 * float((model(x).argmax(1) == y).float().mean())


def head_variance(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Mean over the head's parameters of the gradient variance in each domain (all its training
    images)."""
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    domains = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p[1]) for p in parts]))
    with record(model, params="head", check=False) as tape:
        losses = F.cross_entropy(model(x), y, reduction="none")
    moments = domain_moments(tape, losses, domains, num_domains=len(parts), retain_graph=False)
    flat = torch.cat([v.flatten(1) for v in moments.variance.values()], 1)
    return [float(v) for v in flat.mean(1)]


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


def _reset_peak() -> int | None:
    """Start a new resident-memory peak (Linux); the memory resident now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left would hide what this one takes
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    return _resident("VmRSS")


def _peak(floor: int | None) -> int | None:
    peak = _resident("VmHWM")
    return None if floor is None or peak is None else max(0, peak - floor)
