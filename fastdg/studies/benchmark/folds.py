"""One data set with one domain left out: its splits, and features prepared by training rows."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .datasets import DATASETS, Rows, rows_of

ROWS = 1000  # of a domain at most, drawn anew with each seed
FIT = 0.8  # share of a domain's rows that is trained on; the others choose
Part = tuple[Tensor, Tensor]  # features [n, F] float32 and labels [n] int64


def seed_of(*names: Any) -> int:
    """Return a seed that depends on all the names, as DomainBed's ``seed_hash`` does."""
    return int(hashlib.md5(str(names).encode()).hexdigest(), 16) % 2**31


@dataclass(frozen=True)
class Fold:
    """Rows of the training domains and of the domain left out.

    Attributes:
        fit: of each training domain, to train on.
        held: of each training domain, to choose by.
        test: 80 % of the domain left out, on which accuracy is reported.
        peek: the other 20 %, which only the oracle chooses by.
        classes: number of classes.
    """

    fit: list[Part]
    held: list[Part]
    test: Part
    peek: Part
    classes: int

    @cached_property
    def unseen(self) -> tuple[Tensor, Tensor, list[int]]:
        """Features, labels and sizes of the parts that are not trained on, one after the other:
        ``held``, ``test``, ``peek``."""
        parts = [*self.held, self.test, self.peek]
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return x, y, [len(labels) for _, labels in parts]


@lru_cache(maxsize=1)
def fold_of(name: str, data: Path | None, left_out: int, seed: int) -> Fold:
    """Split and prepare. Deterministic in its arguments; a domain's split does not depend on which
    domain is left out."""
    dataset = DATASETS[name]
    split = [
        _split(rows, seed_of("split", name, seed, d))
        for d, rows in enumerate(rows_of(name, data, seed if dataset.file is None else 0))
    ]
    training = [pair for d, pair in enumerate(split) if d != left_out]
    fit = [first for first, _ in training]
    prepare = _preparation([x for x, _ in fit], dataset.columns, dataset.scaled)

    def part(rows: Rows) -> Part:
        return torch.from_numpy(prepare(rows[0])), torch.from_numpy(rows[1])

    return Fold(
        [part(rows) for rows in fit],
        [part(second) for _, second in training],
        part(split[left_out][0]),
        part(split[left_out][1]),
        dataset.classes,
    )


def _split(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    x, y = rows
    order = np.random.RandomState(seed).permutation(len(y))[:ROWS]
    cut = round(FIT * len(order))
    first, second = order[:cut], order[cut:]
    return (_dense(x[first]), y[first]), (_dense(x[second]), y[second])


def _dense(x: Any) -> np.ndarray:
    dense: np.ndarray = x if isinstance(x, np.ndarray) else x.toarray()
    return dense


def _preparation(fit: list[np.ndarray], columns: int | None, scaled: bool) -> Any:
    """Return the function that prepares features; it knows the rows ``fit`` alone.

    Where features are scaled, missing ones get their mean.
    """
    rows = np.concatenate(fit)
    kept: Any = slice(None)
    if columns is not None:
        kept = np.sort(np.argsort(-(rows != 0).sum(0), kind="stable")[:columns])
    mean, deviation = np.float32(0), np.float32(1)
    if scaled:
        with warnings.catch_warnings():  # of a feature that no row has
            warnings.simplefilter("ignore", RuntimeWarning)
            mean, deviation = np.nanmean(rows, 0), np.nanstd(rows, 0)
        mean = np.nan_to_num(mean)
        deviation = np.where(deviation > 0, deviation, 1)  # also where it is NaN

    def prepare(x: np.ndarray) -> np.ndarray:
        scaled = (x[:, kept] - mean) / deviation
        return np.ascontiguousarray(np.nan_to_num(scaled), np.float32)

    return prepare
