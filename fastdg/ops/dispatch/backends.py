"""Which backends are here, and why one is not. Importing this attaches all that are installed."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ... import native
from ..._torch import has_kernel
from ...dtypes import HALVES
from ..window import PADDED
from .registry import ABSENT, OPS, Implementation, Op, Supports, first_float, force

_LIBRARIES: list[torch.library.Library] = []  # schemas are there as long as their library is


def _float32(op: Op, device: str) -> Supports:
    """Return ``supports`` of a compiled op: it takes fp32, or dtypes cast to it, on its device."""
    taken = (torch.float32,) if op.halves is None else (torch.float32, *HALVES)

    def first(*args: Any) -> str | None:  # the others are like it: the op's check saw to it
        if op.windowed and len(args[-1]) in PADDED:
            return "it reads inputs that are padded"
        x = first_float(args)
        if x.dtype in taken and x.device.type == device:
            return None
        return f"it takes torch.float32 on {device}, not {x.dtype} on {x.device.type}"

    def every(*args: Any) -> str | None:
        for x in args[1:]:
            if isinstance(x, torch.Tensor) and x.dtype not in taken and x.is_floating_point():
                return f"it takes torch.float32 alone, not {x.dtype}"
        return first(*args)

    return every if op.mixed else first


def _widening(op: Op, compiled: Implementation) -> Implementation:
    """Return ``compiled`` so that it takes halves, as float32."""
    if op.halves is None:
        return compiled
    like = op.halves

    def wide(x: Any) -> Any:
        if isinstance(x, list):
            return [wide(part) for part in x]
        return x.float() if isinstance(x, torch.Tensor) and x.dtype in HALVES else x

    def run(*args: Any) -> Any:
        half = (
            any(isinstance(x, torch.Tensor) and x.dtype in HALVES for x in args)
            if op.mixed
            else first_float(args).dtype in HALVES
        )
        if not half:
            return compiled(*args)
        op.check(*args)  # compiled code sees float32 alone, and would take halves beside it
        out = compiled(*map(wide, args))
        if not like:
            return out
        if isinstance(out, torch.Tensor):
            return out.to(args[like[0]].dtype)
        return tuple(x.to(args[k].dtype) for x, k in zip(out, like, strict=True))

    return run


def _counting_writes(op: torch._ops.OpOverload) -> Implementation:
    """Return ``op`` so that autograd counts its writes to memory."""
    written = [
        k
        for k, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if not written:
        return op

    def run(*args: Any) -> Any:
        out = op(*args)
        for k in written:
            torch.autograd.graph.increment_version(args[k])
        return out

    return run


def attach_compiled(backend: str, device: str, namespace: str) -> None:
    """Attach the ops that a loaded extension implements in ``namespace``, with Python's schemas."""
    space = getattr(torch.ops, namespace)
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    for op in OPS.values():
        if not hasattr(space, op.name):
            library.define(op.schema)
        overload = getattr(space, op.name).default
        if has_kernel(overload, device.upper()):
            op.backends[backend] = _widening(op, _counting_writes(overload)), _float32(op, device)
            if backend == "cpp" and not op.writes:
                op.direct = overload


def _attach_native() -> None:
    native.load()
    available, reason = native.status()
    if available:
        attach_compiled("cpp", "cpu", "fastdg_cpp")
        if "without CUDA" not in reason:  # schemas take 2 ms
            attach_compiled("cuda", "cuda", "fastdg_cuda")
    if fault := _native_fault(available, reason):
        warnings.warn(fault, RuntimeWarning, stacklevel=2)


def _native_fault(available: bool, reason: str) -> str | None:
    """Return a warning if this install lacks compiled ops that it should have."""
    if os.environ.get("FASTDG_BACKEND") == "reference":
        return None
    if not available:
        return (
            f"fastdg: the compiled CPU ops are not available ({reason}); "
            "using plain PyTorch, which is correct but slower"
        )
    if native.failed():
        return (
            f"fastdg: the compiled CUDA ops are not available ({native.without_cuda()}); using "
            "Triton or plain PyTorch on CUDA tensors. Install fastdg again when this is mended, or "
            "with FASTDG_BUILD=cpp to do without them."
        )
    return None


def _attach_triton() -> None:
    if importlib.util.find_spec("triton") is not None and torch.cuda.is_available():
        from ...kernels import implementations

        for name, implementation, supports in implementations(OPS):
            OPS[name].backends["triton"] = implementation, supports


def backends() -> dict[str, tuple[bool, str]]:
    """Return the backends of the ops: name -> (available, why or why not)."""
    has_native, native_reason = native.status()
    has_cuda_ops = any("cuda" in op.backends for op in OPS.values())
    if importlib.util.find_spec("triton") is None:
        triton = (False, "the package triton is not installed")
    elif not torch.cuda.is_available():
        triton = (False, "no CUDA device (torch.cuda.is_available() is False)")
    else:
        triton = (True, "Triton kernels on CUDA tensors")
    if has_cuda_ops and torch.cuda.is_available():
        cuda = (True, "compiled CUDA ops on CUDA tensors")
    elif has_cuda_ops:
        cuda = (False, "compiled, but there is no CUDA device")
    else:
        cuda = (False, native.without_cuda())
    return {
        "reference": (True, "plain PyTorch, any device"),
        "cpp": (has_native, native_reason),
        "triton": triton,
        "cuda": cuda,
    }


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Compute every op on ``backend`` inside the ``with`` block, and its derivative wherever
    the backward runs.

    Arguments that it cannot take go to the reference.

    Args:
        backend: one of ``"reference"``, ``"cpp"``, ``"triton"``, ``"cuda"``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not available here; says why.
    """
    available = backends()
    if backend not in available:
        raise ValueError(f"backend: expected one of {tuple(available)}, got {backend!r}")
    ok, reason = available[backend]
    if not ok:
        raise RuntimeError(f"backend {backend!r} is not available: {reason}")
    with force(backend):
        yield


_attach_native()
_attach_triton()
ABSENT.update({name: reason for name, (here, reason) in backends().items() if not here})
