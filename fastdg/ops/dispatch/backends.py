"""Which backends are here, and why one is not. Importing this attaches what is installed."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ... import native
from .registry import ABSENT, OPS, Implementation, Supports, attach, first_float, force

COLUMN_OPS = (
    "gram",
    "combine",
    "combine_rows",
    "agreement",
    "meta_step",
    "variance_gap",
    "variance_gap_backward",
)
CPP_OPS = (
    *COLUMN_OPS,
    "foreach_moments",
    "moments",
    "moments_backward",
    "norm_gradients",
    "norm_gradients_backward",
    "oracle_nll",
    "oracle_nll_backward",
    "outer_moments",
    "outer_moments_backward",
    "outer_agreement",
    "outer_domain",
    "outer_norms",
    "text_distance",
    "text_distance_backward",
)
CUDA_OPS = COLUMN_OPS


# Ops whose tensors may have other dtypes than the first
MIXED = (
    *("combine", "combine_rows", "agreement", "outer_agreement"),
    *("oracle_nll", "oracle_nll_backward", "norm_gradients", "norm_gradients_backward"),
)


def _float32(name: str, device: str) -> Supports:
    """The compiled ops take fp32 on their device; all else goes to the reference."""

    def first(*args: Any) -> bool:  # which the others are like: `checks` saw to it
        x = first_float(args)
        return x.dtype is torch.float32 and x.device.type == device

    def every(*args: Any) -> bool:
        return first(*args) and all(
            x.dtype is torch.float32 or not x.is_floating_point()
            for x in args[1:]
            if isinstance(x, torch.Tensor)
        )

    return every if name in MIXED else first


def _counting_writes(op: torch._ops.OpOverload) -> Implementation:
    """``op``, which writes to memory that autograd watches, and telling autograd of it."""
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


def _attach_native() -> None:
    native.load()
    available, reason = native.status()
    missing = []
    for backend, device, names, namespace in (
        ("cpp", "cpu", CPP_OPS, "fastdg_cpp"),
        ("cuda", "cuda", CUDA_OPS, "fastdg_cuda"),
    ):
        for name in names:
            implementation = getattr(getattr(torch.ops, namespace), name, None)
            if implementation is not None:
                run = _counting_writes(implementation.default)
                attach(name, backend, run, _float32(name, device))
            elif backend == "cpp" or reason.startswith("cuda"):
                missing.append(f"{namespace}.{name}")
    if fault := _native_fault(available, reason, missing):
        warnings.warn(fault, RuntimeWarning, stacklevel=2)


def _native_fault(available: bool, reason: str, missing: list[str]) -> str | None:
    """What to warn of: the compiled ops that this install was to have and has not."""
    if os.environ.get("FASTDG_BACKEND") == "reference":
        return None
    if not available:
        return (
            f"fastdg: the compiled CPU ops are not available ({reason}); "
            "using plain PyTorch, which is correct but slower"
        )
    if missing:
        return (
            f"fastdg: the compiled extension lacks {', '.join(missing)}, so that it was built from "
            "other sources; these run in plain PyTorch. Install fastdg again."
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
        from ...kernels import attach_all

        attach_all()


def backends() -> dict[str, tuple[bool, str]]:
    """What can compute the ops here: name -> (available, why or why not)."""
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
