"""The loss scale of a ``torch.amp.GradScaler``, and steps that the scaler may skip.

`backward` takes the scaler. Every backward inside runs with its scale; statistics are unscaled at
once (`TrackedForward.collect`), and only ``.grad`` stays scaled (`backward.scaled`), as after
``scaler.scale(loss).backward()``. The scaler then calls `step`.
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
from ..gradients.scale import UNSCALED, LossScale
from . import errors
from .base_optimizer import Wrapping
from .nesting import around, chain, innermost

_SET_BY_SCALER = ("grad_scale", "found_inf")  # attributes of an optimizer during `scaler.step`


def loss_scale(opt: Wrapping, scaler: Any, losses: Tensor) -> LossScale:
    """Return the loss scale of this `backward`.

    Raises:
        TypeError, ValueError: ``scaler`` is no GradScaler; ``losses`` are scaled already.
        RuntimeError: staged micro-batches or ``.grad`` have another scale; only some parameters
            are sharded.
    """
    name = type(opt).__name__
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"scaler: expected a torch.amp.GradScaler or None, got {type(scaler).__name__}."
        )
    if scaler is not None and not scaler.is_enabled():
        scaler = None
    if (opt._micro_batches or opt._ready) and opt._loss_scale.scaler is not scaler:
        raise RuntimeError(
            f"scaler: pass the same GradScaler to every {name}.backward of a step, or none. "
            "Gradients with different scales cannot be added. If .grad is left from another step, "
            "call opt.zero_grad()."
        )
    if scaler is None:
        return UNSCALED
    if len({sharded(p) for group in opt.param_groups for p in group["params"]}) > 1:
        raise RuntimeError(
            f"scaler: fully_shard has sharded only some of the parameters of {name} (MIRO adds "
            "parameters of its own), and a GradScaler cannot unscale both kinds together. Train "
            "in bfloat16, which needs no scaler."
        )
    if opt._ready and is_unscaled(scaler, opt):
        raise RuntimeError(
            f"scaler: scaler.unscale_ has already unscaled .grad, so {name}.backward cannot "
            "add to it. Call unscale_ after the last backward of the step."
        )
    scale = scaler.scale(torch.ones((), device=losses.device))
    known, other = scale_of(scaler), getattr(losses.grad_fn, "_saved_other", None)
    if isinstance(known, Tensor) and isinstance(other, Tensor) and _same(known, other):
        raise ValueError(
            "losses: scaler.scale was called on them. Pass them unscaled, since "
            "backward(..., scaler=scaler) scales."
        )
    return LossScale(scaler, scale)


def refuse_scaled(opt: Wrapping) -> None:
    """Raise if a step is about to use scaled gradients."""
    if opt._loss_scale.scaler is not None:
        raise RuntimeError(
            f"{type(opt).__name__}.step(): backward was given a scaler, so .grad is scaled and may "
            "not be finite. Call scaler.step(opt), with opt the outermost wrapper, and "
            "scaler.update()."
        )


def step(opt: Wrapping, closure: Any) -> None:
    """Run ``opt.step()`` inside ``scaler.step(opt)``.

    If the scaler has found an infinity, nothing moves. A fused optimizer inside unscales the
    gradients itself; otherwise the step waits for the device once, as with every optimizer that is
    not fused. After an error it may be called again.
    """
    links = list(chain(opt))
    before = [link._loss_scale for link in links]
    try:
        scaler = _calling_scaler(opt, closure)
        scale, found = (getattr(opt, key) for key in _SET_BY_SCALER)
        if bool(found):
            for link in links:
                link._skip()
                link._release_grad()
            return
        base = innermost(opt)
        fused = scale is not None and takes_scale(base)
        fused = fused and not any(link._reads_grad for link in links)
        if scale is not None and not fused:
            scaler.unscale_(opt)
        for link in links:
            link._loss_scale = UNSCALED
        try:
            if fused:
                base.grad_scale, base.found_inf = scale, found  # type: ignore[attr-defined]
            opt._step(None)
        finally:
            if fused:
                del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
    except BaseException:
        for link, known in zip(links, before, strict=True):
            link._loss_scale = known
        for key in _SET_BY_SCALER:  # the scaler does not clear them after an error
            opt.__dict__.pop(key, None)
        raise


def _calling_scaler(opt: Wrapping, closure: Any) -> GradScaler:
    """Return the scaler that called `step`; raise unless it has scaled ``.grad``, once."""
    name = type(opt).__name__
    writer = next((link for link in chain(opt) if link.role != "average"), opt)
    if closure is not None:
        raise RuntimeError(
            f"closure: a GradScaler does not support closures, got one in {name}.step. Call "
            "opt.backward(losses, domains, scaler=scaler), then scaler.step(opt)."
        )
    if writer._micro_batches or not writer._ready:
        raise errors.no_backward(name, bool(writer._micro_batches))
    scaler = writer._loss_scale.scaler
    if scaler is None:
        raise RuntimeError(
            f"scaler: scaler.step(opt) unscales gradients, but {name}.backward was given no "
            "scaler. Call opt.backward(losses, domains, scaler=scaler), on losses that are not "
            "scaled."
        )
    if not scaler_state(scaler, opt).get("found_inf_per_device"):
        raise RuntimeError(
            f"scaler: scaler.step(opt) was called on another GradScaler than the one given to "
            f"{name}.backward. Use one scaler for both."
        )
    for inner in [*chain(opt.base), innermost(opt)]:
        if _stage(scaler, inner) is not OptState.READY:
            raise RuntimeError(
                f"scaler: unscale_ was called on the {type(inner).__name__} inside {name}, and "
                "scaler.step(opt) would unscale the gradients once more. Pass the outermost "
                "wrapper to both."
            )
    return scaler


def is_unscaled(scaler: GradScaler, opt: Wrapping) -> bool:
    """Whether ``scaler.unscale_`` was called since the last update: on ``opt``, a wrapper around
    it, or an optimizer inside."""
    links = (*around(opt), *chain(opt), innermost(opt))
    return any(_stage(scaler, link) is OptState.UNSCALED for link in links)


def _stage(scaler: GradScaler, opt: Optimizer) -> OptState:
    return scaler_state(scaler, opt).get("stage", OptState.READY)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()
