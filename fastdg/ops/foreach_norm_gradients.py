"""``foreach_norm_gradients``: `norm_gradients` of many norms in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .norm_gradients import check as check_one
from .norm_gradients import dtype_of
from .norm_gradients import reference as of_one


def reference(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    mean: Sequence[Tensor],
    rstd: Sequence[Tensor],
    eps: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    found = [
        of_one(x[k], delta[k], mean[k] if mean else None, rstd[k], False, eps[k] if eps else None)
        for k in range(len(x))
    ]
    return [weight for weight, _ in found], [bias for _, bias in found]


def _fake(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    mean: Sequence[Tensor],
    rstd: Sequence[Tensor],
    eps: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    weights, biases = (
        [
            h.new_empty((h.shape[0], h.shape[2]), dtype=dtype_of(h, d))
            for h, d in zip(x, delta, strict=True)
        ]
        for _ in range(2)
    )
    return weights, biases


def check(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    mean: Sequence[Tensor],
    rstd: Sequence[Tensor],
    eps: Sequence[float],
) -> None:
    if not x:
        raise ValueError("x: expected at least one tensor, got none. Pass one a norm.")
    for name, given in (("delta", delta), ("mean", mean), ("rstd", rstd), ("eps", eps)):
        none = name in ("mean", "eps") and not given
        if len(given) != len(x) and not none:
            raise ValueError(
                f"{name}: expected {len(x)} entries, one for each of x, got {len(given)}. Pass "
                "one a norm."
            )
    for k, h in enumerate(x):
        m, e = mean[k] if mean else None, eps[k] if eps else None
        check_one(h, delta[k], m, rstd[k], False, e)
        checks.on_device(f"x[{k}]", h, x[0], "x[0]")


define(
    "foreach_norm_gradients(Tensor[] x, Tensor[] delta, Tensor[] mean, Tensor[] rstd, float[] eps) "
    "-> (Tensor[], Tensor[])",
    reference,
    _fake,
    check,
    mixed=True,
    halves=(),
)
not_differentiable("foreach_norm_gradients", "Use norm_gradients instead.")


def foreach_norm_gradients(
    x: Sequence[Tensor],
    delta: Sequence[Tensor],
    mean: Sequence[Tensor],
    rstd: Sequence[Tensor],
    eps: Sequence[float] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    r"""`norm_gradients` of many norms in one call: for maps so small that a call takes longer than
    its computation.

    Args:
        x: the norms' inputs, each ``[N, T, C, S]`` as in `norm_gradients`, on one device.
        delta: gradients at the norms' outputs, each of the shape of its input.
        mean: :math:`\mu` of each, ``[N, T, G]``; no entry for norms without a mean.
        rstd: r of each, ``[N, T, G]``.
        eps: makes ``rstd`` variances, as in `norm_gradients`; no entry if they are none.

    Returns:
        ``(weights, biases)``, each with ``[N, C]`` for each norm; float32, or float64 where x or
        delta are. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has another length, dtype, shape or device.
    """
    args = list(x), list(delta), list(mean), list(rstd), list(eps)
    weights, biases = call("foreach_norm_gradients", *args)
    return weights, biases
