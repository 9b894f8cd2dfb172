"""``norm_gradients``: each sample's gradients of a norm's weight and bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .dispatch.derivatives import call, differentiable, not_differentiable
from .dispatch.registry import define
from .gradients import by_rows, gradient_like, statistic_dtype


def dtype_of(x: Tensor, delta: Tensor) -> torch.dtype:
    """Return the dtype of the results, and of mean and rstd."""
    same = x.dtype is delta.dtype  # to promote them dispatches an op
    return statistic_dtype(x.dtype if same else torch.promote_types(x.dtype, delta.dtype))


def reference(
    x: Tensor,
    delta: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    own: bool,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    dtype, rstd = dtype_of(x, delta), reciprocal(rstd, eps)
    x, delta = x.to(dtype), delta.to(dtype)
    return (normalised(x, mean, rstd) * delta).sum((1, 3)), delta.sum((1, 3))


def reciprocal(rstd: Tensor | None, eps: float | None) -> Tensor | None:
    """Return the reciprocal standard deviation; with ``eps`` it is a variance that is given."""
    return rstd if rstd is None or eps is None else (rstd + eps).rsqrt()


def normalised(x: Tensor, mean: Tensor | None, rstd: Tensor | None) -> Tensor:
    if mean is not None:
        x = x - spread(mean, x.shape[2])
    return x if rstd is None else x * spread(rstd, x.shape[2])


def spread(statistic: Tensor, channels: int) -> Tensor:
    """Return ``[N, T, G]`` as ``[N, T, C, 1]``, the same for all channels of a group."""
    groups = statistic.shape[2]
    wide = statistic.unsqueeze(3).expand(*statistic.shape, channels // groups)
    return wide.flatten(2).unsqueeze(3)


def averaged(values: Tensor, groups: int) -> Tensor:
    """Return ``[N, T, C, S]`` as the mean of each group ``[N, T, G]``."""
    return values.unflatten(2, (groups, values.shape[2] // groups)).mean((3, 4))


def reference_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    x: Tensor,
    delta: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    own: bool,
    eps: float | None,
    gain: Tensor | None,
    grad_input: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _by_rows(x, delta, grad_input)
    dtype, rstd = grad_weight.dtype, reciprocal(rstd, eps)
    at_x, at_delta = gradient_like(x, rows), gradient_like(delta, rows)
    x, delta = x.to(dtype), delta.to(dtype)
    normal = normalised(x, mean, rstd)
    slope = grad_weight.unsqueeze(1).unsqueeze(3)
    of_delta = slope * normal + grad_bias.unsqueeze(1).unsqueeze(3)
    of_x = pulled(slope * delta, normal, mean, rstd, own)
    of_gain = torch.zeros_like(grad_weight)
    if grad_input is not None:
        back = pulled(grad_input.to(dtype), normal, mean, rstd, own)
        of_gain = (delta * back).sum((1, 3))
        of_delta = of_delta + scaled(back, gain)
        if own:
            of_x = of_x - turned(scaled(delta, gain), grad_input.to(dtype), normal, mean, rstd)
    return at_x.copy_(of_x), at_delta.copy_(of_delta), of_gain


def scaled(delta: Tensor, gain: Tensor | None) -> Tensor:
    """Return the gradient at the normalised input from the one at the norm's output."""
    return delta if gain is None else delta * gain.to(delta.dtype).unsqueeze(1)


def pulled(
    slopes: Tensor, normal: Tensor, mean: Tensor | None, rstd: Tensor | None, own: bool
) -> Tensor:
    """Return the gradient at the input from the one at the normalised input."""
    if rstd is None:
        return slopes
    groups, channels = rstd.shape[2], normal.shape[2]
    if own:
        through = normal * spread(averaged(slopes * normal, groups), channels)
        if mean is not None:
            through = through + spread(averaged(slopes, groups), channels)
        slopes = slopes - through
    return slopes * spread(rstd, channels)


def turned(
    slopes: Tensor, up: Tensor, normal: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> Tensor:
    """Return minus the gradient of ``(pulled(slopes) * up).sum()`` by the input."""
    assert rstd is not None
    groups, channels = rstd.shape[2], normal.shape[2]

    def average(values: Tensor) -> Tensor:
        return spread(averaged(values, groups), channels)

    a, b, tilt = average(slopes * normal), average(up * normal), average(slopes * up)
    out = b * slopes + a * up
    if mean is not None:
        level_slopes, level_up = average(slopes), average(up)
        out = out - b * level_slopes - a * level_up
        tilt = tilt - level_slopes * level_up
    return (out + normal * (tilt - 3 * a * b)) * spread(rstd, channels).square()


def differentiable_outputs(
    x: Tensor,
    delta: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    own: bool,
    eps: float | None,
    gain: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients at the input, of the weight and of the bias, by operations that have
    derivatives of every order."""
    dtype, rstd = dtype_of(x, delta), reciprocal(rstd, eps)
    x, delta = x.to(dtype), delta.to(dtype)
    if own:  # as functions of x, with the values that were given
        assert rstd is not None
        each = x.unflatten(2, (rstd.shape[2], x.shape[2] // rstd.shape[2]))
        if mean is not None:
            found = each.mean((3, 4))
            mean = mean + (found - found.detach())
            each = each - mean[..., None, None]
        found = each.square().mean((3, 4))
        rstd = (rstd.pow(-2) + (found - found.detach())).rsqrt()
    normal = normalised(x, mean, rstd)
    of_input = pulled(scaled(delta, gain), normal, mean, rstd, own)
    return of_input, (normal * delta).sum((1, 3)), delta.sum((1, 3))


def check(
    x: Tensor,
    delta: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    own: bool,
    eps: float | None,
) -> None:
    checks.floating("x", x)
    checks.dims("x", x, "[N, T, C, S]", 4)
    checks.floating("delta", delta)
    checks.shape("delta", delta, x.shape, "as x")
    checks.on_device("delta", delta, x, "x")
    if eps is not None:
        checks.finite("eps", eps)
    if rstd is None:
        if own or mean is not None or eps is not None:
            raise ValueError(
                "rstd: expected the reciprocal standard deviation that goes with mean, got none. "
                "Pass both as the norm has saved them."
            )
        return
    checks.floating("rstd", rstd)
    checks.dims("rstd", rstd, "[N, T, G]", 3)
    groups = rstd.shape[2]
    if groups < 1 or x.shape[2] % groups:
        raise ValueError(
            f"rstd: expected groups that divide {x.shape[2]} channels, got {groups}. Pass a value "
            "for each group of channels."
        )
    for name, statistic in (("rstd", rstd), ("mean", mean)):
        if statistic is None:
            continue
        checks.statistic(name, statistic, dtype_of(x, delta), x, "x")
        checks.shape(name, statistic, (*x.shape[:2], groups), "N, T, G")


def check_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    x: Tensor,
    delta: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    own: bool,
    eps: float | None,
    gain: Tensor | None,
    grad_input: Tensor | None,
) -> None:
    check(x, delta, mean, rstd, own, eps)
    if gain is not None:
        checks.floating("gain", gain)
        checks.shape("gain", gain, (x.shape[2],), "C")
        checks.on_device("gain", gain, x, "x")
    if grad_input is not None:
        checks.floating("grad_input", grad_input)
        checks.shape("grad_input", grad_input, x.shape, "as x")
        checks.on_device("grad_input", grad_input, x, "x")
    for name, grad in (("grad_weight", grad_weight), ("grad_bias", grad_bias)):
        checks.statistic(name, grad, dtype_of(x, delta), x, "x")
        checks.shape(name, grad, (x.shape[0], x.shape[2]), "N, C")


def _fake(x: Tensor, delta: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape, dtype = (x.shape[0], x.shape[2]), dtype_of(x, delta)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _fake_backward(
    grad_weight: Tensor, grad_bias: Tensor, x: Tensor, delta: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _by_rows(x, delta, rest[-1])
    of_gain = grad_weight.new_empty(grad_weight.shape)
    return gradient_like(x, rows), gradient_like(delta, rows), of_gain


def _by_rows(x: Tensor, delta: Tensor, grad_input: Tensor | None) -> bool:
    return by_rows(x, delta, *(() if grad_input is None else (grad_input,)))


define(
    "norm_gradients(Tensor x, Tensor delta, Tensor? mean, Tensor? rstd, bool own, "
    "float? eps) -> (Tensor, Tensor)",
    reference,
    _fake,
    check,
    mixed=True,
    halves=(),
)
define(
    "norm_gradients_backward(Tensor grad_weight, Tensor grad_bias, Tensor x, Tensor delta, "
    "Tensor? mean, Tensor? rstd, bool own, float? eps, Tensor? gain, Tensor? grad_input) "
    "-> (Tensor, Tensor, Tensor)",
    reference_backward,
    _fake_backward,
    check_backward,
    mixed=True,
    halves=(2, 3, 0),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.own, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(
    ctx: Any, grad_weight: Tensor, grad_bias: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
    x, delta, mean, rstd = ctx.saved_tensors
    args = grad_weight, grad_bias, x, delta, mean, rstd, ctx.own, ctx.eps, None, None
    of_x, of_delta, _ = call("norm_gradients_backward", *args)
    return of_x, of_delta, None, None, None, None


differentiable("norm_gradients", _setup, _backward)
not_differentiable(
    "norm_gradients_backward",
    "norm_gradients is differentiable once. Use its result in one backward.",
)


def norm_gradients(
    x: Tensor,
    delta: Tensor,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    *,
    own: bool = False,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Gradients of the weight and the bias of a norm, of each sample, from one read of its input.

    .. math:: w_{nc} = \sum_{t,s} \delta_{ntcs}\, (x_{ntcs} - \mu_{ntg})\, r_{ntg}, \qquad
              b_{nc} = \sum_{t,s} \delta_{ntcs}

    with :math:`g` the group of channel c.

    Args:
        x: the norm's input ``[N, T, C, S]``, of any strides: S positions of C channels (1 of the
            features of a layer norm), and T such rows in each of N samples.
        delta: gradient at the norm's output, of the shape of ``x``; the dtype may be another.
        mean: :math:`\mu` ``[N, T, G]``, G a divisor of C; None for a norm without a mean.
        rstd: r ``[N, T, G]``; None, together with ``mean``, of a weight without a norm.
        eps: makes ``rstd`` the variance: :math:`r = 1/\sqrt{\text{rstd} + \text{eps}}`.
        own: whether mean and rstd belong to ``x`` itself, so that its derivative goes through them;
            else they are constants.

    Returns:
        ``(weight, bias)``, each ``[N, C]``; float32, or float64 where x or delta are.
        Differentiable once with respect to x and delta.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device.
    """
    return call("norm_gradients", x, delta, mean, rstd, own, eps)
