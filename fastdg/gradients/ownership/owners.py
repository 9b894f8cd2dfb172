"""Owners: the samples of the entries of an output gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

UNREAD = -2


class Output(NamedTuple):
    """Output ``nr`` of the operation behind ``node``."""

    node: Node
    nr: int


@dataclass(frozen=True)
class Owner:
    """Sample of each entry of an output gradient.

    Attributes:
        ids: int64, broadcastable to the gradient; -1 where the gradient is zero, so its sample is
            unknown; `UNREAD` where it is not zero, but too small or not finite.
    """

    ids: Tensor


class Unclear(NamedTuple):
    """Reason for no `Owner`: the output gradient ``mixes`` samples, or is zero everywhere."""

    mixes: bool


# None: no gradient arrives at the output
OwnerMap = dict[Output, Owner | Unclear | None]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two maps agree where both know the sample."""
    return bool(((a == b) | (a < 0) | (b < 0)).all())


def compressed(ids: Tensor) -> Tensor:
    """Drop dimensions along which the sample does not change, where it is known."""
    for dim in range(ids.dim()):
        if ids.shape[dim] == 1:
            continue
        most = ids.amax(dim, keepdim=True)
        if bool(((ids == most) | (ids == -1)).all()):
            ids = most
    return ids


def completed(ids: Tensor, samples: int) -> Tensor:
    """Drop dimensions as in `compressed`, and fill in the samples of unknown rows if a regular
    pattern fits the others. Rows without gradient add nothing."""
    ids = compressed(ids)
    unknown = ids < 0
    count = ids.numel()
    if count % samples or not bool(unknown.any()) or bool(unknown.all()):
        return ids
    place = torch.arange(count, device=ids.device).view(ids.shape)
    for regular in (place // (count // samples), place % samples):
        if bool(((ids == regular) | unknown).all()):
            return compressed(regular)
    return ids
