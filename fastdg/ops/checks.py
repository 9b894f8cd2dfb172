"""Validation of the ops' arguments: once, before any backend, for real and for fake tensors alike.

Each op has a check of shapes, dtypes, devices and numbers, which waits for no device, and some have
a second one of the values of their indices. The second reads indices on the CPU. Indices on another
device are trusted, as reading them would wait for it; ``FASTDG_CHECK_INDICES=1`` has them read too.
Errors say ``argument: problem, got X. What to do.``
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from .window import positions, split

LARGEST = torch.finfo(torch.float32).max
LARGEST_SIDE = 2**28  # of N, D, T, I and O: no product of two of them leaves int64


def floating(name: str, x: Any, like: Tensor | None = None, of: str = "") -> None:
    """Raise unless x is a dense floating-point tensor, of the dtype and device of ``like``."""
    if (
        isinstance(x, Tensor)
        and x.layout is torch.strided
        and (
            x.is_floating_point()
            if like is None
            else x.dtype is like.dtype and x.device == like.device
        )
    ):
        return
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a dense floating-point tensor, got {type(x).__name__}. "
            "Use torch.as_tensor()."
        )
    if x.layout is not torch.strided:
        raise TypeError(
            f"{name}: expected a dense floating-point tensor, got {x.layout}. Use .to_dense()."
        )
    if not x.is_floating_point():
        real = "torch.view_as_real()" if x.is_complex() else ".float()"
        raise TypeError(
            f"{name}: expected a dense floating-point tensor, got {x.dtype}. Use {real}."
        )
    assert like is not None
    raise ValueError(
        f"{name}: expected {like.dtype} on {like.device} as {of}, got {x.dtype} on {x.device}. "
        f"Use {name}.to({of})."
    )


def on_device(name: str, x: Tensor, like: Tensor, of: str) -> None:
    if x.device != like.device:
        raise ValueError(
            f"{name}: expected a tensor on {like.device} as {of}, got one on {x.device}. "
            f"Use {name}.to({of}.device)."
        )


def vector(name: str, x: Any, dtype: torch.dtype, like: Tensor, of: str) -> None:
    """Raise unless x is a dense vector of ``dtype`` on the device of ``like``."""
    if not (isinstance(x, Tensor) and x.dtype is dtype and x.layout is torch.strided):
        got = f"{x.dtype}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a dense tensor of {dtype}, got {got}. Convert it.")
    if x.dim() != 1:
        raise ValueError(f"{name}: expected a vector, got shape {tuple(x.shape)}. Flatten it.")
    on_device(name, x, like, of)


def shape(name: str, x: Tensor, expected: Sequence[Any], letters: str) -> None:
    """Raise unless ``x.shape`` is the expected one, which ``letters`` spell out."""
    if x.shape != expected:
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} ({letters}), got {tuple(x.shape)}. "
            "Pass tensors that belong together."
        )


def dims(name: str, x: Tensor, letters: str, *counts: int) -> None:
    if x.dim() not in counts:
        raise ValueError(
            f"{name}: expected {letters}, got {x.dim()} dimensions, shape {tuple(x.shape)}. "
            "Reshape it."
        )


def number(name: str, x: Any, low: float, high: float, says: str) -> None:
    """Raise unless low <= x <= high."""
    if not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)) or not low <= x <= high:
        raise ValueError(f"{name}: expected {says}, got {x!r}. Pass another number.")


def finite(name: str, x: Any) -> None:
    number(name, x, -LARGEST, LARGEST, "a finite number of float32")


def mask(threshold: float, steepness: float) -> None:
    finite("threshold", threshold)
    number("steepness", steepness, 5e-324, math.inf, "a positive number or inf")


# -- partitions --


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
    """Whether the values of an index are to be looked at."""
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
    """Whether each number is that much larger than the one before it."""
    if isinstance(x, Tensor):
        return bool((x[1:] - x[:-1] >= least).all())
    return all(b - a >= least for a, b in pairwise(x))


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
    """The values of a vector, cut off where they are many."""
    return f"{x[:8].tolist()}{'...' if x.shape[0] > 8 else ''}"


# -- outer products --


def outer(a: Any, delta: Any, window: Sequence[int]) -> tuple[Any, Any]:
    """Check the factors of outer products; returns the shape ``(O, I)`` of their sums."""
    floating("a", a)
    floating("delta", delta, a, "a")
    dims("delta", delta, "[N, T, O]", 3)
    if window:
        T, inputs = _windowed(a, window)
    else:
        dims("a", a, "[N, T, I]", 3)
        _, T, inputs = a.shape
    N, positions, outputs = delta.shape
    if a.shape[0] != N:
        raise ValueError(
            f"a: expected {N} samples as delta, got {a.shape[0]}. Pass tensors of one forward."
        )
    if positions != T:
        raise ValueError(
            f"delta: expected {T} positions (dimension 1), got {positions}. "
            "Flatten the output gradients to [N, T, O] in the order of a's rows or patches."
        )
    for name, size in (("a", T), ("a", inputs), ("delta", outputs)):
        if size > LARGEST_SIDE:
            raise ValueError(
                f"{name}: expected at most 2**28 positions, inputs and outputs, got {size}. "
                "Split the layer."
            )
    return outputs, inputs


def _windowed(a: Tensor, window: Sequence[int]) -> tuple[Any, Any]:
    """``(T, I)`` of the patches."""
    count = a.dim() - 2
    if count < 1 or len(window) != 3 * count:
        raise ValueError(
            f"window: expected 3 numbers for each of {max(count, 0)} spatial dimensions of a "
            f"[N, C, *S], got {len(window)}. Pass [*kernel, *stride, *dilation]."
        )
    for step in window:
        if not hasattr(step, "__index__") or step < 1:
            raise ValueError(
                f"window: expected positive integers, got {step!r}. "
                "Pass [*kernel, *stride, *dilation]."
            )
    kernel, _, dilation = split(window)
    for size, k, d in zip(a.shape[2:], kernel, dilation, strict=True):
        if d * (k - 1) >= size:
            raise ValueError(
                f"window: expected patches that fit into a, got one of {d * (k - 1) + 1} places on "
                f"{size}. Pad a first (fastdg.ops.window.pad)."
            )
    T, inputs = 1, a.shape[1]
    for places, k in zip(positions(a.shape[2:], window), kernel, strict=True):
        T, inputs = T * places, inputs * k
    return T, inputs


# -- lists of tensors --


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
            shape(name, x, flat[index % P].shape, f"that of gradients[0][{index % P}]")


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


def shaped(name: str, tensors: Sequence[Tensor], likes: Sequence[Tensor], of: str) -> None:
    """Check the shapes of a list by those of another."""
    for k, (x, like) in enumerate(zip(tensors, likes, strict=True)):
        if x.shape != like.shape:
            shape(f"{name}[{k}]", x, like.shape, f"that of {of}[{k}]")


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
