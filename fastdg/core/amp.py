"""``torch.amp.GradScaler``: gradients with its factor, and steps that it may skip.

`backward` takes the scaler and hands on its factor: every backward pass inside runs with it, what
it finds is divided by it at once (`statistics.collect`), and ``.grad`` alone carries it
(`backward.scaled`), as after ``scaler.scale(loss).backward()``. `step` is told by the scaler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from .._torch import scale_of, scaler_state, takes_scale
from ..distributed.sharding import sharded
from . import errors
from .base_optimizer import Wrapping
from .nesting import chain, innermost

_SHOWN = ("grad_scale", "found_inf")  # what the scaler sets on an optimizer before its step


def factor(opt: Wrapping, scaler: Any, losses: Tensor) -> Tensor | None:
    """The scaler's factor for this `backward` (0-dim, on the device), None if there is none.

    Raises:
        TypeError, ValueError: it is no scaler; ``losses`` have its factor already.
        RuntimeError: what was staged, or left in ``.grad``, has another factor; some parameters
            are sharded.
    """
    name = type(opt).__name__
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"scaler: expected a torch.amp.GradScaler or None, got {type(scaler).__name__}"
        )
    if scaler is not None and not scaler.is_enabled():
        scaler = None
    if (opt._micro_batches or opt._ready) and opt._scaler is not scaler:
        raise RuntimeError(
            f"scaler: pass the same GradScaler to every {name}.backward of a step, or none. "
            "Gradients with different scales cannot be added. If .grad is left from another step, "
            "call opt.zero_grad()"
        )
    opt._scaler = scaler
    if scaler is None:
        return None
    if len({sharded(p) for group in opt.param_groups for p in group["params"]}) > 1:
        raise RuntimeError(
            f"{name}.backward: fully_shard has split some of the parameters and not others (MIRO "
            "adds some of its own), and a GradScaler cannot go through the gradients of both; "
            "train in bfloat16, which needs none"
        )
    if opt._ready and _add_micro_batch(scaler, opt) is OptState.UNSCALED:
        raise RuntimeError(
            f"{name}.backward: scaler.unscale_(opt) has already divided what is in .grad; call it "
            "after the last backward before the step"
        )
    scale = scaler.scale(torch.ones((), device=losses.device))
    known, other = scale_of(scaler), getattr(losses.grad_fn, "_saved_other", None)
    if isinstance(known, Tensor) and isinstance(other, Tensor) and _same(known, other):
        raise ValueError(
            "losses: scaler.scale was called on them; pass them as they are, since "
            "backward(..., scaler=scaler) does that"
        )
    return scale


def refuse_scaled(opt: Wrapping) -> None:
    """Raise if a step is about to be made on gradients that have a factor."""
    if opt._scaler is not None:
        raise RuntimeError(
            f"{type(opt).__name__}.step(): backward was given a scaler, so .grad has its factor "
            "and may not be finite; call scaler.step(opt), with opt the outermost wrapper, and "
            "scaler.update()"
        )


def step(opt: Wrapping, closure: Any) -> None:
    """``opt.step()`` where it is called by ``scaler.step(opt)``.

    Where the scaler has found an infinity nothing moves. A fused optimizer inside takes the factor
    out itself; one wait for the device, as with every optimizer that is not fused.
    """
    try:
        scaler = _caller(opt, closure)
        scale, found = (getattr(opt, key) for key in _SHOWN)
        links = list(chain(opt))
        if bool(found):
            for link in links:
                link._skip()
                link._release_grad()
            return
        base = innermost(opt)
        handed = scale is not None and takes_scale(base)
        handed = handed and not any(link._reads_grad for link in links)
        if scale is not None and not handed:
            scaler.unscale_(opt)
        for link in links:
            link._scaler = None
        try:
            if handed:
                base.grad_scale, base.found_inf = scale, found  # type: ignore[attr-defined]
            opt._step(None)
        finally:
            if handed:
                del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
    except BaseException:
        for key in _SHOWN:  # the scaler itself leaves them there
            opt.__dict__.pop(key, None)
        raise


def _caller(opt: Wrapping, closure: Any) -> GradScaler:
    """The scaler that calls, if it is the one whose factor is in ``.grad``, just once."""
    name = type(opt).__name__
    maker = next((link for link in chain(opt) if link.role != "average"), opt)
    if closure is not None:
        raise RuntimeError(
            f"{name}.step: a GradScaler does not go with closures; call opt.backward(losses, "
            "domains, scaler=scaler), then scaler.step(opt)"
        )
    if maker._micro_batches or not maker._ready:
        raise errors.no_backward(name, bool(maker._micro_batches))
    scaler = maker._scaler
    if scaler is None:
        raise RuntimeError(
            f"{name}: scaler.step(opt) divides gradients by the scaler's factor, which backward "
            "was not told; call opt.backward(losses, domains, scaler=scaler), on losses that are "
            "not scaled"
        )
    if not scaler_state(scaler, opt).get("found_inf_per_device"):
        raise RuntimeError(f"{name}: scaler.step(opt) is not that of the scaler given to backward")
    for inner in [*chain(opt.base), innermost(opt)]:
        if _add_micro_batch(scaler, inner) is not OptState.READY:
            raise RuntimeError(
                f"{name}: scaler.unscale_ was called on the {type(inner).__name__} inside, and "
                "scaler.step(opt) would divide the gradients once more; pass the outermost "
                "wrapper to both"
            )
    return scaler


def _add_micro_batch(scaler: GradScaler, opt: Optimizer) -> OptState:
    return scaler_state(scaler, opt).get("stage", OptState.READY)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()
