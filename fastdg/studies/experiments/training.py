"""One run of an algorithm on a task with one domain left out, selected as DomainBed selects."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import (
    GGA,
    MLDG,
    POGM,
    SWAD,
    DomainOptimizer,
    Fish,
    PGrad,
    domain_gram,
    domain_moments,
    record,
)
from ..._torch import foreach_div_
from ...averaging.averaged import Averaged
from ...core.term import Term
from ...outer.ascent import Ascent
from ..data.digits import Task
from .memory import measured
from .pretraining import pretrain
from .settings import ALGORITHMS, EVALUATIONS, Setting

Part = tuple[Tensor, Tensor]  # images and labels
FIELDS = ("chosen", "last", "chosen_step", "step_seconds", "peak_bytes", "curve")  # of a run


def train(
    task: Task, setting: Setting, algorithm: str, left_out: int, seed: int, steps: int
) -> dict[str, Any]:
    """Train on all domains but one. Deterministic in its arguments, times and memory aside.

    Each training domain is split 80:20 and trained on its 80 %. The checkpoint to report is the one
    with the best mean accuracy on the 20 % parts, the first if there are several: DomainBed's
    training-domain selection. The domain left out takes no part in it. Of an average of weights,
    the averaged model is evaluated.

    Returns:
        ``chosen`` and ``last``: accuracy (per cent) on the whole domain left out, of the chosen
        checkpoint and after the last step; ``chosen_step``; ``step_seconds``, the median over the
        steps with the full penalty (plain training: the same steps); ``peak_bytes`` of the last
        step; and ``curve``, at each evaluation ``step``, ``loss``, ``validation``, ``test``, of
        the head's gradients in the training domains ``variance`` (the mean over parameters, one
        value a domain) and ``distance`` (see `head_variances`), and the ``cosine`` of each pair of
        training domains' gradients (see `cosines`).
    """
    generator = torch.Generator().manual_seed(1000 * seed + left_out)
    training = [d for d in range(len(task.domains)) if d != left_out]
    fit, held = split(task, training, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = setting.network(task.images[0].shape[1], task.classes)
    if ALGORITHMS[algorithm].pretrained:
        pretrain(model, [x for x, _ in fit], seed)
    opt = setting.optimizer(algorithm, model, training, steps, seed)
    domains = domain_ids(fit, setting.batch)
    anneal = setting.anneal_steps(steps)
    whole = torch.cat([part[0] for part in fit]), torch.cat([part[1] for part in fit])

    def batch() -> Part:
        if setting.batch is None:
            return whole
        rows = [torch.randint(len(y), (setting.batch,), generator=generator) for _, y in fit]
        xs = [part[0][r] for part, r in zip(fit, rows, strict=True)]
        ys = [part[1][r] for part, r in zip(fit, rows, strict=True)]
        return torch.cat(xs), torch.cat(ys)

    def step(x: Tensor, y: Tensor) -> Tensor:
        if isinstance(opt, (Fish, MLDG, PGrad, POGM)):  # which ask for one domain after the other
            splits = opt.splits if isinstance(opt, PGrad) else 1
            each = [(domains == d).nonzero()[:, 0] for d in range(len(training))]
            parts = [cycle(rows.tensor_split(splits)) for rows in each]

            def closure(d: int) -> Tensor:
                rows = next(parts[d])
                return F.cross_entropy(model(x[rows]), y[rows], reduction="none")

            mean = opt.step(closure)
            assert mean is not None
            return mean
        opt.zero_grad()
        if isinstance(opt, GGA):  # which runs the model as often as it likes
            mean = opt.step(lambda: (losses_of(model, opt, x, y)[0], domains))
            assert mean is not None
            return mean
        if isinstance(opt, DomainOptimizer) and not isinstance(opt, Averaged):
            losses, inputs = losses_of(model, opt, x, y)
            loss = opt.backward(losses, domains, **inputs)
            if isinstance(opt, Ascent):
                for _ in range(1, opt.points):
                    opt.ascend()
                    losses, inputs = losses_of(model, opt, x, y)
                    opt.backward(losses, domains, **inputs)
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            foreach_div_(grads, setting.divisor(opt))
        else:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        opt.step()
        return loss.detach()

    curve: list[dict[str, Any]] = []
    seconds: list[float] = []
    peak = 0
    marks = {round(steps * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
    for count in range(1, steps + 1):
        x, y = batch()
        if count < steps:
            began = time.perf_counter()
            loss = step(x, y)
            if count > anneal:
                seconds.append(time.perf_counter() - began)
        else:
            loss, peak = measured(partial(step, x, y))
        if count in marks:
            if isinstance(opt, SWAD):
                opt.evaluate(mean_loss(model, held))
            with opt.applied() if isinstance(opt, Averaged) else nullcontext():
                variance, distance = head_variances(model, fit)
                curve.append(
                    {
                        "step": count,
                        "loss": float(loss),
                        "validation": statistics.fmean(accuracy(model, *part) for part in held),
                        "test": accuracy(model, task.images[left_out], task.labels[left_out]),
                        "variance": variance,
                        "distance": distance,
                        "cosine": cosines(model, fit),
                    }
                )
    best = max(curve, key=lambda point: point["validation"])
    return {
        "chosen": best["test"],
        "last": curve[-1]["test"],
        "chosen_step": best["step"],
        "step_seconds": statistics.median(seconds),
        "peak_bytes": peak,
        "curve": curve,
    }


def losses_of(
    model: nn.Sequential, opt: DomainOptimizer, x: Tensor, y: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Return the samples' losses, and the further inputs of ``opt.backward``."""
    takes = tuple(opt.inputs()) if isinstance(opt, Term) else opt.takes
    known = {"labels": y}
    if "features" in takes:
        known["features"] = model[:-1](x)
        logits = model[-1](known["features"])
    else:
        logits = model(x)
    known["logits"] = logits
    inputs = {name: known[name] for name in takes if name in known}
    return F.cross_entropy(logits, y, reduction="none"), inputs


def split(
    task: Task, training: Sequence[int], generator: torch.Generator
) -> tuple[list[Part], list[Part]]:
    """Each training domain's images and labels, 80 % to fit and 20 % to choose by; all copies of
    an image in the same part."""
    fit: list[Part] = []
    held: list[Part] = []
    for d in training:
        images = len(task.labels[d]) // task.copies
        order = torch.randperm(images, generator=generator)
        cut = round(0.8 * images)
        for part, chosen in ((fit, order[:cut]), (held, order[cut:])):
            rows = (chosen + images * torch.arange(task.copies).unsqueeze(1)).flatten()
            part.append((task.images[d][rows], task.labels[d][rows]))
    return fit, held


def domain_ids(parts: Sequence[Part], batch: int | None) -> Tensor:
    """Domain of each sample of a batch, ``batch`` (or all) of each part one after the other."""
    counts = torch.tensor([batch or len(y) for _, y in parts])
    return torch.arange(len(parts)).repeat_interleave(counts)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    return 100 * float((model(x).argmax(1) == y).float().mean())


@torch.no_grad()
def mean_loss(model: nn.Module, parts: Sequence[Part]) -> float:
    """Return the mean of the parts' losses."""
    return statistics.fmean(float(F.cross_entropy(model(x), y)) for x, y in parts)


def head_variances(model: nn.Module, parts: Sequence[Part]) -> tuple[list[float], float]:
    r"""How the head's gradients vary in each domain, over all its images to fit.

    Returns:
        The mean over parameters of each domain's variance :math:`v_d`, and how far they are apart,
        :math:`\sqrt{\frac1D\sum_d\|v_d-\bar v\|^2}\,/\,\|\bar v\|`: Fishr's penalty without scale.
    """
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    with record(model, params="head", check=False) as tape:
        losses = F.cross_entropy(model(x), y, reduction="none")
    domains = domain_ids(parts, None)
    moments = domain_moments(tape, losses, domains, num_domains=len(parts), retain_graph=False)
    v = torch.cat([part.flatten(1) for part in moments.variance.values()], 1)
    middle = v.mean(0)
    apart = (v - middle).square().sum(1).mean().sqrt() / middle.norm()
    return v.mean(1).tolist(), float(apart)


def cosines(model: nn.Module, parts: Sequence[Part]) -> list[float]:
    """Between the gradients of the domains' mean losses, all layers, over all images to fit.

    Returns:
        One value a pair of domains: (0, 1), (0, 2), ..., (1, 2), ...
    """
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    with record(model, check=False) as tape:
        losses = F.cross_entropy(model(x), y, reduction="none")
    domains = domain_ids(parts, None)
    gram = domain_gram(tape, losses, domains, num_domains=len(parts), retain_graph=False)
    length = gram.diagonal().sqrt()
    pairs = torch.triu_indices(len(parts), len(parts), 1)
    found: list[float] = (gram / torch.outer(length, length))[pairs[0], pairs[1]].tolist()
    return found
