"""One schema per op; backends attach implementations to it, and a call is routed at run time.

Every op lives in ``torch.ops.fastdg``. Its schema, shapes (fake) and reference are defined in
Python; compiled parts only *attach*. The route is chosen per call, inside the op, so that a backend
can be switched under ``torch.compile`` without recompiling.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..._torch import unknown_size_errors
from ...carried import Carried

BACKENDS = ("reference", "cpp", "triton", "cuda")
# Fastest first. Whatever is absent, or does not support the arguments, is passed over.
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}

Implementation = Callable[..., Any]
Check = Callable[..., Any]
Supports = Callable[..., bool]

library = torch.library.Library("fastdg", "DEF")
_forced: Carried[str | None] = Carried("fastdg_backend", None)


@dataclass
class Op:
    """One op: its checks (`fastdg.ops.checks`), its reference and whatever else can compute it.

    The first argument is a tensor, or a list of them, on the device where the op runs.
    """

    name: str
    reference: Implementation
    fake: Implementation
    check: Check
    check_values: Check | None = None
    backends: dict[str, tuple[Implementation, Supports]] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        self.check(*args)
        device = _first(args).device.type
        if device == "meta":
            return self.fake(*args)
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # numbers are those outside of it
                return self._run(*args)
        return self._run(*args)

    def _run(self, *args: Any) -> Any:
        implementation = self.route(*args)
        if self.check_values is None:
            return implementation(*args)
        if implementation is self.reference or args[0].device.type != "cpu":
            self.check_values(*args)
            return implementation(*args)
        try:  # the compiled ops check indices as they read them
            return implementation(*args)
        except RuntimeError:
            self.check_values(*args)
            raise

    def shapes(self, *args: Any) -> Any:
        """The fake implementation, after the checks."""
        with suppress(*unknown_size_errors()):  # of a size that is known when the op runs
            self.check(*args)
        return self.fake(*args)

    def route(self, *args: Any) -> Implementation:
        """The implementation that serves these arguments."""
        device = _first(args).device.type
        forced = _forced.get()
        if forced is None and (forced := os.environ.get("FASTDG_BACKEND") or None) is not None:
            _check(forced)
        order = PREFERENCE.get(device, ("reference",)) if forced is None else (forced, "reference")
        for backend in order:
            if backend == "reference":
                break
            entry = self.backends.get(backend)
            if entry is not None and entry[1](*args):
                return entry[0]
        return self.reference


def _first(args: tuple[Any, ...]) -> Tensor:
    return args[0] if isinstance(args[0], Tensor) else args[0][0]


def first_float(args: Sequence[Any]) -> Tensor:
    """The first tensor, or tensor of a list, that is no index."""
    for arg in args:
        for x in arg[:1] if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(x, Tensor) and x.is_floating_point():
                return x
    raise TypeError("args: expected a floating-point tensor, got none")


OPS: dict[str, Op] = {}
ABSENT: dict[str, str] = {}  # why nothing was attached as this backend


def _check(forced: str) -> None:
    """Raise unless something was attached as the backend ``forced``."""
    if forced not in BACKENDS:
        raise ValueError(f"FASTDG_BACKEND: expected one of {BACKENDS}, got {forced!r}")
    if forced != "reference" and not any(forced in op.backends for op in OPS.values()):
        raise RuntimeError(f"FASTDG_BACKEND={forced}: not available here: {ABSENT[forced]}")


def define(
    schema: str,
    reference: Implementation,
    fake: Implementation,
    check: Check,
    check_values: Check | None = None,
) -> Op:
    """Define ``fastdg::<schema>`` with its reference, its shape rule and its checks: of shapes,
    dtypes and devices, and of the values of indices, after one of them a tensor of the data."""
    name = schema.split("(", 1)[0]
    op = Op(name, reference, fake, check, check_values)
    library.define(schema)
    library.impl(name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdg::{name}", op.shapes, lib=library)
    OPS[name] = op
    return op


def attach(
    name: str, backend: str, implementation: Implementation, supports: Supports | None = None
) -> None:
    """Let ``backend`` compute op ``name`` for the arguments that ``supports`` accepts."""
    OPS[name].backends[backend] = (implementation, supports or (lambda *args: True))


def forced_backend() -> str | None:
    """The backend of the `use_backend` block that this thread is in."""
    return _forced.get()


@contextmanager
def force(backend: str) -> Iterator[None]:
    """Compute every op on ``backend``, which is here, inside the ``with`` block."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
