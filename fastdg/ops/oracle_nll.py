"""``oracle_nll``: how likely an oracle's feature map is, given the trained network's map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .dispatch.derivatives import call, differentiable, not_differentiable
from .dispatch.registry import define
from .gradients import by_rows, gradient_like, statistic_dtype

FLOOR = 1e-5  # of the variance: it bounds the gain of coinciding features


def variance_of(bias: Tensor) -> Tensor:
    """Return the variance that a bias b stands for, positive."""
    return F.softplus(bias) + FLOOR


def reference(features: Tensor, oracle: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dtype = statistic_dtype(features.dtype)
    squares = (features.to(dtype) - oracle.to(dtype)).square_().sum(2)
    return values_of(squares, bias.to(dtype), features.shape[2]), squares


def values_of(squares: Tensor, bias: Tensor, positions: int) -> Tensor:
    """Return the value of each sample ``[N]`` from its sums of squares ``[N, C]``."""
    variance = variance_of(bias)
    total = (squares / variance + positions * variance.log()).sum(1)
    return total * (0.5 / max(1, squares.shape[1] * positions))


def _fake(features: Tensor, oracle: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    N, C, _ = features.shape
    dtype = statistic_dtype(features.dtype)
    return features.new_empty((N,), dtype=dtype), features.new_empty((N, C), dtype=dtype)


def reference_backward(
    grad: Tensor, features: Tensor, oracle: Tensor, bias: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    positions = features.shape[2]
    share = grad / max(1, squares.shape[1] * positions)
    slope = share.unsqueeze(1) / variance_of(bias.to(grad.dtype))
    change = (features.to(grad.dtype) - oracle.to(grad.dtype)).mul_(slope.unsqueeze(2))
    out = gradient_like(features, by_rows(features)).copy_(change)
    return out, bias_gradient(grad, bias, squares, positions)


def bias_gradient(grad: Tensor, bias: Tensor, squares: Tensor, positions: int) -> Tensor:
    """Return the derivative by the bias ``[C]``, from the sums of squares ``[N, C]`` alone."""
    return bias_gradients(grad, bias, squares, positions).sum(0).to(bias.dtype)


def bias_gradients(grad: Tensor, bias: Tensor, squares: Tensor, positions: int) -> Tensor:
    """Return each sample's part of it, ``[N, C]``."""
    b = bias.to(squares.dtype)
    variance = variance_of(b)
    slope = (positions - squares / variance) * (b.sigmoid() / variance)
    return slope * (grad * (0.5 / max(1, squares.shape[1] * positions))).unsqueeze(1)


def _fake_backward(
    grad: Tensor, features: Tensor, oracle: Tensor, bias: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    return gradient_like(features, by_rows(features)), torch.empty_like(bias)


def check(features: Tensor, oracle: Tensor, bias: Tensor) -> None:
    checks.floating("features", features)
    checks.dims("features", features, "[N, C, P]", 3)
    checks.floating("oracle", oracle)
    checks.shape("oracle", oracle, features.shape, "as features")
    checks.floating("bias", bias)
    checks.shape("bias", bias, features.shape[1:2], "C, a value for each channel")
    checks.on_device("oracle", oracle, features, "features")
    checks.on_device("bias", bias, features, "features")


def check_backward(
    grad: Tensor, features: Tensor, oracle: Tensor, bias: Tensor, squares: Tensor
) -> None:
    check(features, oracle, bias)
    for name, x, dims in (("grad", grad, 1), ("squares", squares, 2)):
        checks.statistic(name, x, statistic_dtype(features.dtype), features, "features")
        checks.shape(name, x, features.shape[:dims], "N, C"[: 3 * dims - 2])


define(
    "oracle_nll(Tensor features, Tensor oracle, Tensor bias) -> (Tensor, Tensor)",
    reference,
    _fake,
    check,
    mixed=True,
)
define(
    "oracle_nll_backward(Tensor grad, Tensor features, Tensor oracle, Tensor bias, Tensor squares) "
    "-> (Tensor, Tensor)",
    reference_backward,
    _fake_backward,
    check_backward,
    mixed=True,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, oracle, bias = inputs
    ctx.positions = features.shape[2]
    # For the bias alone the maps need not live on
    maps = (features, oracle) if any(ctx.needs_input_grad[:2]) else ()
    ctx.save_for_backward(bias, output[1], *maps)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, of_squares: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    bias, squares, *maps = ctx.saved_tensors
    if grad is None:
        grad = squares.new_zeros(squares.shape[:1])
    if not maps:
        return None, None, bias_gradient(grad, bias, squares, ctx.positions)
    of_features, of_bias = call("oracle_nll_backward", grad, *maps, bias, squares)
    if of_squares is not None:  # which nobody but PyTorch's own checks asks for
        of_features = of_features + 2 * of_squares.unsqueeze(2) * (maps[0] - maps[1])
    return of_features, -of_features if ctx.needs_input_grad[1] else None, of_bias


differentiable("oracle_nll", _setup, _backward)
not_differentiable(
    "oracle_nll_backward", "oracle_nll is differentiable once. Use its result in one backward."
)


def oracle_nll(
    features: Tensor, oracle: Tensor, bias: Tensor, *, sample: int = 0, channel: int = 1
) -> Tensor:
    r"""Negative log-likelihood of an oracle's features under a Gaussian around the given ones.

    .. math::
        \text{nll}_n = \frac1{2CP} \sum_{c,p} \Bigl(
            \frac{(F_{ncp} - F^0_{ncp})^2}{s_c} + \log s_c \Bigr), \qquad
        s_c = \operatorname{softplus}(b_c) + 10^{-5}

    up to a constant, with P positions (pixels, tokens). Each map is read once; only the sums of
    squares ``[N, C]`` are kept besides the maps, and where the features need no gradient the maps
    are not kept either. Features that coincide with the oracle's are as likely as the floor of s
    lets them be: the value is bounded below by :math:`\tfrac12\log 10^{-5} \approx -5.76`.

    Args:
        features: F, of any shape and strides; C channels in dimension ``channel``.
        oracle: :math:`F^0`, of the same shape and device; the dtype may be another.
        bias: b ``[C]``.
        sample: dimension of the N samples.
        channel: dimension of the C channels.

    Returns:
        ``[N]``; float32, or float64 for features in float64. Differentiable once with respect to
        all three.

    Raises:
        TypeError, ValueError: shapes or devices do not fit, or something is not a dense
            floating-point tensor.

    Reference:
        Cha, Lee, Park, Chun: Domain Generalization by Mutual-Information Regularization with
        Pre-trained Models, ECCV 2022.
    """
    values, _ = call("oracle_nll", *both(features, oracle, sample, channel), bias)
    return values


def sums_of_squares(
    features: Tensor, oracle: Tensor, bias: Tensor, *, sample: int = 0, channel: int = 1
) -> Tensor:
    r""":math:`\sum_p (F_{ncp} - F^0_{ncp})^2`, ``[N, C]``; not differentiable."""
    with torch.no_grad():
        return call("oracle_nll", *both(features, oracle, sample, channel), bias)[1]


def both(features: Tensor, oracle: Tensor, sample: int, channel: int) -> tuple[Tensor, Tensor]:
    """Return both maps as ``[N, C, P]``, after a check of their full shapes."""
    for name, x in (("features", features), ("oracle", oracle)):
        checks.floating(name, x)
        checks.shape(name, x, features.shape, "as features")
    return arranged(features, sample, channel), arranged(oracle, sample, channel)


def arranged(x: Tensor, sample: int, channel: int) -> Tensor:
    """Return ``x`` as ``[N, C, P]``: a view, unless its positions lie in no regular order."""
    dims = x.dim()
    inside = -dims <= sample < dims and -dims <= channel < dims
    if dims < 2 or not inside or sample % dims == channel % dims:
        raise ValueError(
            f"features: expected a sample and a channel dimension, got shape {tuple(x.shape)} with "
            f"sample={sample}, channel={channel}. Name two different dimensions."
        )
    x = x.movedim((sample, channel), (0, 1))
    return x.unsqueeze(2) if dims == 2 else x.flatten(2)
