"""One algorithm on one data set with one domain left out: all trials of its search."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ... import SWAD
from ...averaging.averaged import Averaged
from ..experiments.settings import EVALUATIONS
from .algorithms import CONTENDERS, hparams_of
from .folds import Fold, Part, fold_of, seed_of

FIELDS = ("trials",)  # of a unit


def search(
    data: Path | None,
    dataset: str,
    left_out: int,
    algorithm: str,
    seed: int,
    trials: int,
    steps: int,
) -> dict[str, Any]:
    """Train with each setting of the search. Deterministic in its arguments, times aside.

    The seed decides on the rows, their split, the settings, the first weights and the batches; all
    algorithms share them.

    Returns:
        ``trials``: of each, the results of `train` and its ``hparams``.
    """
    of = (dataset, left_out, seed)
    fold = fold_of(dataset, data, left_out, seed)
    more = (algorithm,) if CONTENDERS[algorithm].again else ()
    found = []
    for trial in range(trials):
        hparams = hparams_of(algorithm, trial, steps, *of)
        run = train(fold, algorithm, hparams, steps, seed_of("train", *of, trial, *more))
        found.append({**run, "hparams": hparams})
    return {"trials": found}


def train(
    fold: Fold, algorithm: str, hparams: dict[str, Any], steps: int, seed: int
) -> dict[str, Any]:
    """Train on all domains but one, with a batch of each in every step.

    The model is evaluated `EVALUATIONS` times; a run ends at an evaluation whose validation loss
    is not finite. Of an average of weights, the averaged model is evaluated.

    Returns:
        ``validation``: the best mean accuracy (per cent) over the training domains' held-out
        parts; ``test``: accuracy there on the domain left out; ``step``: where that was, the first
        if it was several times; ``peek`` and ``peek_test``: after the last step, accuracy on the
        part of the domain left out by which the oracle chooses, and on the rest; ``cpu``: seconds
        of processor time of a step, the mean.
    """
    contender = CONTENDERS[algorithm]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that a search may well draw
        torch.manual_seed(seed)
        features = fold.test[0].shape[1]
        model = contender.network(features, fold.classes, len(fold.fit), hparams)
        generator = torch.Generator().manual_seed(seed)
        marks = {round(steps * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
        curve: list[dict[str, Any]] = []
        seconds = 0.0
        for count in range(1, steps + 1):
            batch = _batch(fold.fit, hparams["batch_size"], generator)
            began = time.process_time()
            model.update(batch)
            seconds += time.process_time() - began
            if count in marks:
                point, loss = _evaluated(model, fold)
                curve.append({"step": count, **point})
                if not math.isfinite(loss):
                    break
    best = max(curve, key=lambda point: point["validation"])
    last = curve[-1]
    return {
        "validation": best["validation"],
        "test": best["test"],
        "step": best["step"],
        "peek": last["peek"],
        "peek_test": last["test"],
        "cpu": float(f"{seconds / count:.3g}"),
    }


def _batch(fit: Sequence[Part], size: int, generator: torch.Generator) -> list[Part]:
    rows = [torch.randint(len(y), (size,), generator=generator) for _, y in fit]
    return [(x[r], y[r]) for (x, y), r in zip(fit, rows, strict=True)]


def _evaluated(model: Any, fold: Fold) -> tuple[dict[str, float], float]:
    """Return accuracies, in per cent, and the loss of the held-out parts, of the average if there
    is one."""
    opt, network = model.wrapper(), model.network
    averaged: Any = nullcontext()
    if isinstance(opt, Averaged):
        if isinstance(opt, SWAD) and math.isfinite(loss := _measure(network, fold)[0]):
            opt.evaluate(loss)
        averaged = opt.applied()
    with averaged:
        loss, right = _measure(network, fold)
    *held, test, peek = right
    values = {"validation": statistics.fmean(held), "test": test, "peek": peek}
    return {name: round(value, 3) for name, value in values.items()}, loss


@torch.no_grad()
def _measure(network: nn.Module, fold: Fold) -> tuple[float, list[float]]:
    """Return the mean of the held-out parts' losses, and each unseen part's accuracy in per
    cent."""
    x, labels, sizes = fold.unseen
    logits = network(x)
    losses = F.cross_entropy(logits, labels, reduction="none")
    loss = statistics.fmean(float(part.mean()) for part in losses.split(sizes)[: len(fold.held)])
    right = 100 * (logits.argmax(1) == labels).float()
    return loss, [float(part.mean()) for part in right.split(sizes)]
