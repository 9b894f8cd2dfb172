"""Checks of partitions of the samples into domains, and of class labels."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .tensors import LARGEST_SIDE, vector


def partition(order: Any, offsets: Any, like: Tensor, of: str) -> Any:
    """Check shapes and dtypes of a partition of the samples of ``like``; returns D."""
    vector("order", order, torch.int64, like, of)
    vector("offsets", offsets, torch.int64, like, of)
    if order.shape[0] > like.shape[0]:
        raise ValueError(
            f"order: expected each of the {like.shape[0]} samples of {of} at most once, got "
            f"{order.shape[0]} numbers. Pass a partition of these samples."
        )
    if offsets.shape[0] < 1:
        raise ValueError(
            "offsets: expected D + 1 positions, got none. Pass [0] for a partition without domains."
        )
    for name, size in (("order", order.shape[0]), ("offsets", offsets.shape[0] - 1)):
        if size > LARGEST_SIDE:
            raise ValueError(
                f"{name}: expected at most 2**28 samples and domains, got {size}. Split the batch."
            )
    return offsets.shape[0] - 1


def readable(x: Tensor) -> bool:
    """Return whether to read the values of an index."""
    return x.device.type == "cpu" or os.environ.get("FASTDG_CHECK_INDICES") == "1"


def partition_values(order: Tensor, offsets: Tensor, samples: int) -> None:
    """Check the numbers of a partition."""
    if not readable(order):
        return
    count, ends = order.shape[0], (int(offsets[0]), int(offsets[-1]))
    if ends != (0, count):
        raise ValueError(
            f"offsets: expected positions from 0 to {count}, the length of order, got "
            f"{ends[0]} to {ends[1]}. Cut order to the samples that have a domain."
        )
    if not _ascending(offsets if offsets.shape[0] > FEW else offsets.tolist(), 0):
        raise ValueError(
            f"offsets: expected ascending positions, got {_short(offsets)}. "
            "Sort the samples by domain: offsets are the running counts."
        )
    if count == 0:
        return
    numbers = order.sort().values if count > FEW else sorted(order.tolist())
    low, high = int(numbers[0]), int(numbers[-1])
    if low < 0 or high >= samples:
        raise ValueError(
            f"order: expected samples from 0 to {samples - 1}, got sample "
            f"{low if low < 0 else high} of {samples}. Pass a partition of these samples."
        )
    if not _ascending(numbers, 1):
        twice = next(int(m) for m, n in pairwise(numbers) if m == n)
        raise ValueError(
            f"order: expected each sample at most once, got sample {twice} twice. "
            "Give each sample one domain."
        )


FEW = 512  # numbers, which Python goes through faster than a few ops


def _ascending(x: Tensor | list[int], least: int) -> bool:
    """Return whether each number exceeds the one before it by ``least`` or more."""
    if isinstance(x, Tensor):
        return bool((x[1:] - x[:-1] >= least).all())
    return all(b - a >= least for a, b in pairwise(x))


def domain_values(domains: Tensor, num_domains: int) -> None:
    if not readable(domains) or domains.shape[0] == 0:
        return
    low, high = (int(x) for x in domains.aminmax())
    if low < 0 or high >= num_domains:
        raise ValueError(
            f"domains: expected ids from 0 to {num_domains - 1}, got {low if low < 0 else high}. "
            "Pass the number of domains."
        )


def label_values(labels: Tensor, classes: int) -> None:
    if not readable(labels) or labels.shape[0] == 0:
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels: expected classes from 0 to {classes - 1}, got class "
            f"{low if low < 0 else high} of {classes}. Map the labels to rows of classes."
        )


def _short(x: Tensor) -> str:
    """Return the values of a vector, cut off where they are many."""
    return f"{x[:8].tolist()}{'...' if x.shape[0] > 8 else ''}"
