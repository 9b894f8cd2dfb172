"""Checks of lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from .tensors import dims, floating, on_device, shape


def gradients(flat: Sequence[Tensor], domains: Any) -> None:
    """Check lists of the gradients of D domains, one after the other."""
    if not hasattr(domains, "__index__") or domains < 1:
        raise ValueError(
            f"domains: expected at least 1, got {domains!r}. Pass the gradients of one domain "
            "or more."
        )
    if len(flat) == 0 or len(flat) % domains != 0:
        raise ValueError(
            f"gradients: expected at least one tensor, and as many for each of {domains} domains, "
            f"got {len(flat)}. Pass zeros for a gradient that a domain lacks."
        )
    P, first = len(flat) // domains, flat[0]
    floating("gradients[0][0]", first)
    dtype, device = first.dtype, first.device
    for index, x in enumerate(flat):
        if not (
            isinstance(x, Tensor)
            and x.dtype is dtype
            and x.layout is torch.strided
            and x.device == device
            and (index < P or x.shape == flat[index % P].shape)
        ):
            name = f"gradients[{index // P}][{index % P}]"
            floating(name, x, first, "gradients[0][0]")
            shape(name, x, flat[index % P].shape, f"as gradients[0][{index % P}]")


def one_each(name: str, x: Any, domains: Any) -> None:
    """Check a floating-point number for each domain."""
    floating(name, x)
    shape(name, x, (domains,), "D")


def weighted(flat: Sequence[Tensor], weights: Any) -> None:
    """Check gradients, and a weight for each domain."""
    floating("weights", weights)
    dims("weights", weights, "[D]", 1)
    gradients(flat, weights.shape[0])
    on_device("weights", weights, flat[0], "gradients[0][0]")


def alike(name: str, tensors: Sequence[Tensor], first: Tensor, of: str) -> None:
    """Check that the tensors of a list are dense, and of the dtype and device of the first one."""
    dtype, device = first.dtype, first.device
    for k, x in enumerate(tensors):
        if not (
            isinstance(x, Tensor)
            and x.dtype is dtype
            and x.layout is torch.strided
            and x.device == device
        ):
            floating(f"{name}[{k}]", x, first, of)


def shaped(name: str, tensors: Sequence[Tensor], expected: Sequence[Any], of: str) -> None:
    """Check that the tensors of a list have the shapes of the tensors of another."""
    if [x.shape for x in tensors] != expected:
        for k, (x, like) in enumerate(zip(tensors, expected, strict=True)):
            shape(f"{name}[{k}]", x, like, f"as {of}[{k}]")


def written(**lists: Sequence[Tensor]) -> None:
    """Check that no two elements that an op writes share memory, as far as addresses tell."""

    def name(place: int) -> str:
        for word, tensors in lists.items():
            if place < len(tensors):
                return f"{word}[{place}]"
            place -= len(tensors)
        raise IndexError(place)

    spans = []
    for place, x in enumerate(chain(*lists.values())):
        if type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta:  # without addresses
            return
        size = x.numel()
        if size == 0:
            continue
        extent = size
        if not x.is_contiguous():
            extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            if extent < size:
                _shared(name(place), "itself")
        begin = x.data_ptr()
        spans.append((begin, begin + extent * x.element_size(), extent == size, place))
    spans.sort()
    for (begin, end, dense, place), (begin2, _, dense2, place2) in pairwise(spans):
        # Columns of one matrix lie between each other and share nothing
        if begin == begin2 or (begin2 < end and dense and dense2):
            _shared(name(place2), name(place))


def _shared(name: str, other: str) -> NoReturn:
    raise ValueError(
        f"{name}: expected memory of its own, which is written to, got a tensor that shares some "
        f"with {other}. Pass each tensor once, and clones of expanded ones."
    )
