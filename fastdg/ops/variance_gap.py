"""``variance_gap``: how far the domains' gradient variances are apart, all parameters at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .dispatch.derivatives import call, differentiable, not_differentiable
from .dispatch.registry import define


def _gap(variance: Tensor, ema: Tensor | None, present: Tensor, history: float) -> Tensor:
    """``u - mean(u)`` over the domains present; zero rows for the others."""
    u = variance if ema is None else variance + history * ema
    mask = present.view(-1, *([1] * (u.dim() - 1)))
    centre = u.where(mask, 0).sum(0) / present.sum().clamp(min=1)
    return (u - centre).where(mask, 0)


def _pairs(variance: Sequence[Tensor], ema: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    return list(zip(variance, ema or [None] * len(variance), strict=True))  # type: ignore[list-item]


def reference(
    variance: Sequence[Tensor], ema: Sequence[Tensor], present: Tensor, history: float
) -> Tensor:
    total = variance[0].new_zeros(())
    for v, m in _pairs(variance, ema):
        total = total + _gap(v, m, present, history).square().sum()
    return total


def _fake(
    variance: Sequence[Tensor], ema: Sequence[Tensor], present: Tensor, history: float
) -> Tensor:
    return variance[0].new_empty(())


def reference_backward(
    grad: Tensor,
    variance: Sequence[Tensor],
    ema: Sequence[Tensor],
    present: Tensor,
    history: float,
) -> list[Tensor]:
    return [_gap(v, m, present, history) * (2 * grad) for v, m in _pairs(variance, ema)]


def _fake_backward(
    grad: Tensor,
    variance: Sequence[Tensor],
    ema: Sequence[Tensor],
    present: Tensor,
    history: float,
) -> list[Tensor]:
    return [v.new_empty(v.shape) for v in variance]


def check(
    variance: Sequence[Tensor], ema: Sequence[Tensor], present: Tensor, history: float
) -> None:
    if len(variance) == 0:
        raise ValueError("variance: expected at least one tensor, got none. Pass one a parameter.")
    if len(ema) not in (0, len(variance)):
        raise ValueError(
            f"ema: expected no tensors or {len(variance)}, one for each variance, got {len(ema)}. "
            "Pass [] without a history."
        )
    first = variance[0]
    checks.floating("variance[0]", first)
    checks.alike("variance", variance, first, "variance[0]")
    checks.vector("present", present, torch.bool, first, "variance[0]")
    D = present.shape[0]
    shapes = [v.shape for v in variance]
    for k, shape in enumerate(shapes):
        if not shape or shape[0] != D:
            raise ValueError(
                f"variance[{k}]: expected a row for each of the {D} domains of present, got shape "
                f"{tuple(shape)}. Pass variances [D, *]."
            )
    if ema:
        checks.alike("ema", ema, first, "variance[0]")
        checks.shaped("ema", ema, shapes, "variance")
    checks.finite("history", history)


def check_backward(
    grad: Tensor,
    variance: Sequence[Tensor],
    ema: Sequence[Tensor],
    present: Tensor,
    history: float,
) -> None:
    check(variance, ema, present, history)
    checks.floating("grad", grad, variance[0], "variance[0]")
    checks.shape("grad", grad, (), "0-dim")


define(
    "variance_gap(Tensor[] variance, Tensor[] ema, Tensor present, float history) -> Tensor",
    reference,
    _fake,
    check,
)
define(
    "variance_gap_backward(Tensor grad, Tensor[] variance, Tensor[] ema, Tensor present, "
    "float history) -> Tensor[]",
    reference_backward,
    _fake_backward,
    check_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    variance, ema, present, history = inputs
    ctx.save_for_backward(present, *variance, *ema)
    ctx.parts, ctx.history = len(variance), history


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], list[None], None, None]:
    present, *saved = ctx.saved_tensors
    variance, ema = saved[: ctx.parts], saved[ctx.parts :]
    grads = call("variance_gap_backward", grad, variance, ema, present, ctx.history)
    return grads, [None] * len(ema), None, None


differentiable("variance_gap", _setup, _backward)
not_differentiable(
    "variance_gap_backward", "variance_gap is differentiable once. Use its result in one backward."
)


def variance_gap(
    variance: Sequence[Tensor], ema: Sequence[Tensor], present: Tensor, history: float
) -> Tensor:
    r"""Spread of the domains' gradient variances around their mean.

    .. math:: \sum_k \sum_{d\in\text{present}} (u_{dk} - \bar u_k)^2, \qquad u = v + h\,m

    Args:
        variance: per-parameter variances, each ``[D, *]``.
        ema: detached history of the same shapes, or an empty list (then ``u = v``).
        present: ``[D]`` bool; domains without samples take no part.
        history: the weight h of the history; :math:`\gamma/(1-\gamma)` in DomainBed's Fishr.

    Returns:
        0-dim tensor, differentiable once with respect to ``variance``.

    Raises:
        TypeError, ValueError: a list, ``present`` or ``history`` is not as described.
    """
    return call("variance_gap", list(variance), list(ema), present, history)
