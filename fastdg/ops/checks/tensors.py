"""Checks of one tensor and of one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


def statistic(name: str, x: Any, dtype: torch.dtype, like: Tensor, of: str) -> None:
    """Raise unless x is a dense tensor of ``dtype``, a result's, on the device of ``like``."""
    floating(name, x)
    if x.dtype is not dtype:
        raise TypeError(
            f"{name}: expected {dtype}, the dtype of the results, got {x.dtype}. Use .to()."
        )
    on_device(name, x, like, of)


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
