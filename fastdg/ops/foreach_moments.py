"""``foreach_moments``: moments by domain of many small parameters' gradients in one call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from . import checks
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import statistic_dtype
from .moments import reference as dense_moments
from .outer_domain import reference as outer_domain
from .outer_moments import reference as outer_moments


def reference(
    order: Tensor,
    offsets: Tensor,
    grads: Sequence[Tensor],
    a: Sequence[Tensor],
    delta: Sequence[Tensor],
    variance: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    D = offsets.numel() - 1
    means, variances = [], []
    for g in grads:
        parts = dense_moments(g.reshape(len(g), g.shape[1:].numel()), order, offsets)
        mean, spread = (part.reshape(D, *g.shape[1:]) for part in parts)
        means.append(mean)
        variances.append(spread)
    for x, d in zip(a, delta, strict=True):
        x, d = (x, d) if x.dim() == 3 else (x.unsqueeze(1), d.unsqueeze(1))
        if variance:
            mean, spread = outer_moments(x, d, order, offsets, ())
            variances.append(spread)
        else:
            mean = outer_domain(x, d, order, offsets, ())
        means.append(mean)
    return means, variances if variance else []


def _fake(
    order: Tensor,
    offsets: Tensor,
    grads: Sequence[Tensor],
    a: Sequence[Tensor],
    delta: Sequence[Tensor],
    variance: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    D = offsets.shape[0] - 1
    shapes = [(g, (D, *g.shape[1:])) for g in grads]
    shapes += [(x, (D, d.shape[-1], x.shape[-1])) for x, d in zip(a, delta, strict=True)]
    means = [like.new_empty(shape, dtype=statistic_dtype(like.dtype)) for like, shape in shapes]
    return means, [torch.empty_like(mean) for mean in means] if variance else []


def check(
    order: Tensor,
    offsets: Tensor,
    grads: Sequence[Tensor],
    a: Sequence[Tensor],
    delta: Sequence[Tensor],
    variance: bool,
) -> None:
    if len(a) != len(delta):
        raise ValueError(
            f"delta: expected {len(a)} tensors, one for each of a, got {len(delta)}. Pass the two "
            "factors of each parameter."
        )
    if not (grads or a):
        raise ValueError("grads: expected a tensor there or in a, got none. Pass one a parameter.")
    first, of = (grads[0], "grads[0]") if grads else (a[0], "a[0]")
    checks.floating(of, first)
    for name, tensors in (("grads", grads), ("a", a), ("delta", delta)):
        checks.alike(name, tensors, first, of)
    if first.dim() == 0:
        raise ValueError(f"{of}: expected a row for each sample, got no dimensions. Reshape it.")
    N = first.shape[0]
    for k, g in enumerate(grads):
        if g.dim() == 0 or g.shape[0] != N:
            _refuse(f"grads[{k}]", f"{N} samples as {of}", g)
    for k, (x, d) in enumerate(zip(a, delta, strict=True)):
        rows = x.shape[:-1]
        if len(rows) not in (1, 2) or rows[0] != N:
            _refuse(f"a[{k}]", f"[N, I] or [N, T, I] with {N} samples as {of}", x)
        if d.shape[:-1] != rows:
            _refuse(f"delta[{k}]", f"the rows of a[{k}]", d)
        if (size := max(x.numel(), d.numel())) > checks.LARGEST_SIDE:
            name = "a" if x.numel() == size else "delta"
            raise ValueError(
                f"{name}[{k}]: expected at most 2**28 elements, got {size}. Use outer_moments."
            )
    checks.partition(order, offsets, first, of)


def _refuse(name: str, expected: str, x: Tensor) -> None:
    raise ValueError(
        f"{name}: expected {expected}, got shape {tuple(x.shape)}. Pass tensors of one forward."
    )


def check_values(
    order: Tensor,
    offsets: Tensor,
    grads: Sequence[Tensor],
    a: Sequence[Tensor],
    delta: Sequence[Tensor],
    variance: bool,
) -> None:
    checks.partition_values(order, offsets, next(chain(grads, a)).shape[0])


define(
    "foreach_moments(Tensor order, Tensor offsets, Tensor[] grads, Tensor[] a, Tensor[] delta, "
    "bool variance) -> (Tensor[], Tensor[])",
    reference,
    _fake,
    check,
    check_values,
    halves=(),
)
not_differentiable("foreach_moments", "Use moments or outer_moments instead.")


def foreach_moments(
    grads: Sequence[Tensor],
    a: Sequence[Tensor],
    delta: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    variance: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    r"""`moments` of each of ``grads`` and `outer_moments` of each pair of ``a`` and ``delta``, in
    one call: for parameters so small that a call takes longer than its computation.

    Args:
        grads: per-sample gradients, each ``[N, *shape]``.
        a: layer inputs, each ``[N, I]``, or ``[N, T, I]``.
        delta: gradients at the layers' outputs, each ``[N, O]``, or ``[N, T, O]``, in the order of
            ``a``. All tensors are of one dtype and on one device.
        order, offsets: a partition of the samples by domain, as in `moments`.
        variance: whether the variances are wanted, too.

    Returns:
        ``(means, variances)``: one of ``[D, *shape]`` for each of ``grads``, then one of
        ``[D, O, I]`` for each pair; an empty list of variances that are not wanted. In float32, or
        in float64 for tensors in float64. Zeros for an empty domain. Not differentiable.

    Raises:
        TypeError, ValueError: the lists are empty, or not of one length; a tensor has another
            dtype, shape or device; or ``order`` and ``offsets`` are no partition.
    """
    made = call("foreach_moments", order, offsets, list(grads), list(a), list(delta), variance)
    means, variances = made
    return means, variances
