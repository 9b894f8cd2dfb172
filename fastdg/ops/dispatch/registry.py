"""One schema per op; backends attach implementations to it, and a call is routed at run time.

Every op lives in ``torch.ops.fastdg``. Its schema, shapes (fake) and reference are defined in
Python; compiled parts only *attach*. The route is chosen per call, inside the op, so that a backend
can be switched under ``torch.compile`` without recompiling. The logger ``fastdg.ops`` says at level
DEBUG why a backend does not serve a call, each reason once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ..._torch import unknown_size_errors
from ...carried import Carried
from ...dtypes import HALVES

_OTHERS = (torch.float64, *HALVES)
_NONE = None, None  # of a backend that is absent
BACKENDS = ("reference", "cpp", "triton", "cuda")
# Fastest first. Whatever is absent, or does not support the arguments, is passed over.
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}

Implementation = Callable[..., Any]
Check = Callable[..., Any]
Supports = Callable[..., str | None]  # why the arguments cannot be taken; None: they can

library = torch.library.Library("fastdg", "DEF")
log = logging.getLogger("fastdg.ops")
_logged: set[tuple[str, str, str]] = set()
_forced: Carried[str | None] = Carried("fastdg_backend", None)
_forces = False  # whether any thread has ever been in a `use_backend` block


@dataclass
class Op:
    """One op: its checks (`fastdg.ops.checks`), its reference and all backends that compute it.

    The first argument is a tensor, or a list of them, on the device where the op runs.
    """

    schema: str
    reference: Implementation
    fake: Implementation
    check: Check
    check_values: Check | None = None
    mixed: bool = False
    halves: tuple[int, ...] | None = None
    backends: dict[str, tuple[Implementation, Supports]] = field(default_factory=dict)
    # Compiled code for float32 on the CPU, which checks as it reads: small calls go there at once
    direct: Implementation | None = None

    @property
    def name(self) -> str:
        return self.schema.split("(", 1)[0]

    @cached_property
    def writes(self) -> bool:
        """Whether it changes an argument."""
        return "!" in self.schema

    @cached_property
    def windowed(self) -> bool:
        """Whether its last argument is a window, which is empty for a linear map."""
        return self.schema.split(") ->")[0].endswith("int[] window")

    def __call__(self, *args: Any) -> Any:
        try:
            forced = forced_backend() or from_environment()
            if self.direct is not None and forced is None and self._float32(args):
                return self.direct(*args)
            implementation = self.route(*args)
            # Ops of the CPU check as they read, those that write before they begin
            if not self.writes and implementation is self.backends.get("cpp", _NONE)[0]:
                return implementation(*args)
        except Exception:  # the checks say more than compiled code
            self.check(*args)
            if self.check_values is not None:
                self.check_values(*args)
            raise
        self.check(*args)
        device = _first(args).device.type
        if device == "meta":
            return self.fake(*args)
        if self.check_values is not None:
            self.check_values(*args)
        # An op computes under autocast as it does outside of it
        on = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if on else nullcontext():
            return implementation(*args)

    def _float32(self, args: Sequence[Any]) -> bool:
        """Whether the arguments are float32 on the CPU, without a window."""
        x = first_float(args)
        if x.dtype is not torch.float32 or not x.is_cpu or (self.windowed and args[-1]):
            return False
        return not (self.mixed and any(isinstance(y, Tensor) and y.dtype in _OTHERS for y in args))

    def shapes(self, *args: Any) -> Any:
        """Return the fake implementation, after the checks."""
        with suppress(*unknown_size_errors()):  # of a size that is known when the op runs
            self.check(*args)
        return self.fake(*args)

    def route(self, *args: Any) -> Implementation:
        """Return the implementation that serves these arguments."""
        device = _first(args).device.type
        forced = forced_backend()
        if forced is None and (forced := from_environment()) is not None:
            _check(forced)
        order = PREFERENCE.get(device, ("reference",)) if forced is None else (forced, "reference")
        for backend in order:
            if backend == "reference":
                break
            entry = self.backends.get(backend)
            if entry is None:
                continue
            reason = entry[1](*args)
            if reason is None:
                return entry[0]
            if log.isEnabledFor(logging.DEBUG):
                self._log(backend, reason)
        return self.reference

    def _log(self, backend: str, reason: str) -> None:
        if (entry := (self.name, backend, reason)) not in _logged:
            _logged.add(entry)
            log.debug("fastdg::%s: %s does not serve this call: %s", *entry)


@cache
def from_environment() -> str | None:
    """Return the backend that ``FASTDG_BACKEND`` names; it is read once."""
    return os.environ.get("FASTDG_BACKEND") or None


def _first(args: tuple[Any, ...]) -> Tensor:
    return args[0] if isinstance(args[0], Tensor) else args[0][0]


def first_float(args: Sequence[Any]) -> Tensor:
    """Return the first tensor, or tensor of a list, that is no index."""
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
    *,
    mixed: bool = False,
    halves: tuple[int, ...] | None = None,
) -> Op:
    """Define ``fastdg::<schema>``.

    Args:
        schema: the name and the arguments, for ``torch.ops`` and for all backends.
        reference: the op in plain PyTorch.
        fake: the shapes of the result.
        check: refuses wrong shapes, dtypes and devices.
        check_values: refuses wrong values of indices.
        mixed: whether some tensors may have another floating dtype than the first.
        halves: of an op whose results for bfloat16 and float16 are float32, or have the dtype of
            an argument: the positions of these arguments. Compiled code then gets halves as
            float32.
    """
    op = Op(schema, reference, fake, check, check_values, mixed, halves)
    library.define(schema)
    library.impl(op.name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdg::{op.name}", op.shapes, lib=library)
    OPS[op.name] = op
    return op


def forced_backend() -> str | None:
    """Return the backend of the `use_backend` block that this thread is in."""
    return _forced.get() if _forces else None


@contextmanager
def force(backend: str) -> Iterator[None]:
    """Compute every op on ``backend``, which is here, inside the ``with`` block."""
    global _forces
    _forces = True
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
