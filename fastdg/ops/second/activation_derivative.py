r"""``activation_derivative``: the derivative of an activation's input gradient, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt

import torch
from torch import Tensor

from ...dtypes import to_statistics_dtype
from .. import checks
from ..dispatch.derivatives import call, not_differentiable
from ..dispatch.registry import define

# x s(w(x)) with s the logistic function: w = x, and w = 2 sqrt(2 / pi) (x + CUBE x^3)
RATE, CUBE = 2 * sqrt(2 / pi), 0.044715


def _gated(x: Tensor, w: Tensor, w1: Tensor | float, w2: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return both derivatives of x s(w), with the derivatives w1 and w2 of w."""
    s, other = torch.sigmoid(w), torch.sigmoid(-w)
    slope = s * other
    return s + x * slope * w1, slope * (2 * w1 + x * ((other - s) * w1 * w1 + w2))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.exp(x.square() * -0.5) * (1 / sqrt(2 * pi))
    share = 0.5 * torch.special.erfc(x * -sqrt(0.5))
    return share + x * density, density * (2 - x.square())


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    w = RATE * (x + CUBE * x * x * x)
    return _gated(x, w, RATE * (1 + 3 * CUBE * x.square()), RATE * 6 * CUBE * x)


# Kind -> first and second derivative of the activation
DERIVATIVES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "gelu": _gelu,
    "gelu, tanh": _gelu_tanh,
    "silu": lambda x: _gated(x, x, 1.0, 0.0),
}
KINDS = list(DERIVATIVES)


def recorded(x: Tensor, delta: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return `activation_derivative` by operations that have derivatives of every order."""
    one, two = DERIVATIVES[kind](to_statistics_dtype(x))
    above = to_statistics_dtype(up)
    return (above * to_statistics_dtype(delta) * two).to(x.dtype), (above * one).to(delta.dtype)


def reference(x: Tensor, delta: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    of_x, of_delta = recorded(x, delta, up, KINDS[kind])
    return of_x.contiguous(), of_delta.contiguous()


def _fake(x: Tensor, delta: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), delta.new_empty(x.shape)


def check(x: Tensor, delta: Tensor, up: Tensor, kind: int) -> None:
    checks.floating("x", x)
    for name, other in (("delta", delta), ("up", up)):
        checks.floating(name, other)
        checks.shape(name, other, x.shape, "as x")
        checks.on_device(name, other, x, "x")
    if not 0 <= kind < len(KINDS):
        raise ValueError(f"kind: expected 0 to {len(KINDS) - 1}, got {kind}. See KINDS.")


define(
    "activation_derivative(Tensor x, Tensor delta, Tensor up, int kind) -> (Tensor, Tensor)",
    reference,
    _fake,
    check,
    mixed=True,
    halves=(0, 1),
)
not_differentiable(
    "activation_derivative", "Differentiate `recorded`, the same by operations of PyTorch."
)


def activation_derivative(x: Tensor, delta: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    r"""Derivative of an activation's input gradient :math:`\delta\, f'(x)`.

    .. math:: x^* = u\, \delta\, f''(x), \qquad \delta^* = u\, f'(x)

    Args:
        x: the activation's input, of any shape and strides.
        delta: :math:`\delta`, the gradient at its output, of the shape of ``x``.
        up: u, the gradient that comes back to the input gradient, of the shape of ``x``.
        kind: f: ``"gelu"``, ``"gelu, tanh"`` (GELU by its approximation) or ``"silu"``.

    Returns:
        ``(x*, delta*)`` in the dtypes of ``x`` and ``delta``; values are computed in float32, or in
        float64. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}.")
    lies = sorted(range(x.dim()), key=x.stride, reverse=True)  # contiguous, where x is dense
    back = sorted(range(x.dim()), key=lies.__getitem__)
    arguments = (t.permute(lies) for t in (x, delta, up))
    of_x, of_delta = call("activation_derivative", *arguments, KINDS.index(kind))
    return of_x.permute(back), of_delta.permute(back)
