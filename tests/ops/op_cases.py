"""What the ops are tried on, and the truth: loops in float64 written out in full."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Window = Sequence[int]


# -- the truth --


def rows_of(a: Tensor, window: Window) -> Tensor:
    """The rows ``[N, T, I]`` that the gradients multiply: patches are put together tap by tap."""
    if not window:
        return a
    dims = len(window) // 3
    kernel, stride, dilation = (window[k * dims : (k + 1) * dims] for k in range(3))
    columns = []
    for channel in range(a.shape[1]):
        for taps in itertools.product(*map(range, kernel)):
            where: list[int | slice] = [channel]
            for size, k, s, d, tap in zip(a.shape[2:], kernel, stride, dilation, taps, strict=True):
                count = (size - d * (k - 1) - 1) // s + 1
                where.append(slice(tap * d, tap * d + s * (count - 1) + 1, s))
            columns.append(torch.stack([sample[tuple(where)].flatten() for sample in a]))
    return torch.stack(columns, 2)


def gradients(a: Tensor, delta: Tensor, window: Window) -> Tensor:
    """The gradients ``[N, O, I]`` in float64, sample by sample, position by position."""
    if not len(a):
        columns = a.shape[1] * math.prod(window[: len(window) // 3]) if window else a.shape[2]
        return torch.zeros(0, delta.shape[2], columns, dtype=torch.float64)
    rows = rows_of(a.detach().double().cpu(), window)
    return torch.stack(
        [
            torch.stack([torch.outer(d, x) for d, x in zip(deltas, inputs, strict=True)]).sum(0)
            for deltas, inputs in zip(delta.detach().double().cpu(), rows, strict=True)
        ]
    )


def naive_moments(grads: Tensor, counts: Sequence[int], order: Tensor) -> tuple[Tensor, Tensor]:
    means, variances, start = [], [], 0
    for count in counts:
        rows = [grads[i] for i in order[start : start + count].tolist()]
        start += count
        mean = sum(rows, grads[:0].sum(0)) / max(1, count)
        means.append(mean)
        squares = [(row - mean) ** 2 for row in rows]
        variances.append(sum(squares, torch.zeros_like(mean)) / max(1, count))
    return torch.stack(means), torch.stack(variances)


# -- what the ops are tried on --

COUNTS = {
    "ragged": (4, 1, 0, 7),
    "one domain": (9,),
    "one sample": (1,),
    "one sample each": (1, 1, 1),
    "empty first and last": (0, 5, 0),
    "no samples": (0, 0),
}


def deal(counts: Sequence[int], device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(sum(counts), generator=generator)
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    return order.to(device), offsets.to(device)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, lying otherwise in memory."""
    if layout == "transposed":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "samples last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x


LAYOUTS = ["plain", "transposed", "strided", "samples last"]
# T, I, O
ROWS = [
    (1, 5, 3),
    (1, 1, 1),
    (1, 1, 5),
    (1, 4, 1),
    (1, 33, 17),
    (3, 4, 5),
    (7, 9, 2),
    (2, 16, 24),
    (13, 1, 6),
]
# channels, outputs, spatial size of the padded input, window
CONVOLUTIONS: list[tuple[int, int, tuple[int, ...], Window]] = [
    (2, 3, (7,), (3, 1, 1)),
    (3, 2, (9,), (2, 3, 2)),
    (2, 4, (5, 6), (3, 3, 1, 1, 1, 1)),
    (1, 2, (7, 6), (2, 3, 2, 1, 2, 1)),
    (3, 1, (4, 4), (1, 1, 2, 2, 1, 1)),
    (1, 4, (2,), (1, 2, 1)),
    (2, 2, (4, 3, 4), (2, 2, 3, 1, 1, 1, 2, 1, 1)),
]
CASES = [("rows", shape) for shape in ROWS] + [("window", shape) for shape in CONVOLUTIONS]


def case(kind: str, shape: tuple, samples: int, dtype: torch.dtype, device: str = "cpu"):  # type: ignore[no-untyped-def,type-arg]
    """``(a, delta, window)``, with means away from zero."""
    if kind == "rows":
        T, inputs, outputs = shape
        a, window = torch.randn(samples, T, inputs) + 0.3, ()
    else:
        channels, outputs, spatial, window = shape
        a = torch.randn(samples, channels, *spatial) + 0.3
        T = rows_of(torch.zeros(1, channels, *spatial), window).shape[1]
    delta = torch.randn(samples, T, outputs) - 0.2
    return a.to(device, dtype), delta.to(device, dtype), list(window)


def assert_close(got: Tensor, expected: Tensor, size: float | None = None) -> None:
    """By norm, within the rounding of sums of the size given."""
    assert got.shape == expected.shape
    limit = 1e-12 if got.dtype == torch.float64 else 1e-5
    size = float(expected.norm()) if size is None else size
    assert float((got.detach().double().cpu() - expected).norm()) <= limit * max(size, 1e-30)
