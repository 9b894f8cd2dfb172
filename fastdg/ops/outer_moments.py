"""``outer_moments``: moments of gradients that are sums of outer products and never stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..dtypes import to_statistics_dtype
from . import checks
from .dispatch.derivatives import call, differentiable, not_differentiable
from .dispatch.registry import define
from .gradients import statistic_dtype
from .window import fold, sizes, unfold

# Per-sample gradients the reference holds at once, in elements (64 MiB of fp32).
CHUNK_ELEMENTS = 1 << 24
# Below this share of mean^2, E[g^2] - mean^2 has lost three digits or more
CANCELS = 1 / 256


def domain_rows(order: Tensor, offsets: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``(domain, its sample numbers)`` for every non-empty domain."""
    bounds = offsets.tolist()
    for domain, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            yield domain, order[start:stop]


def with_positions(a: Any, delta: Any) -> tuple[Any, Any]:
    """Return ``a [N, T, I]`` and ``delta [N, T, O]``; T may be missing in both where it is 1."""
    if isinstance(a, Tensor) and isinstance(delta, Tensor) and a.dim() == delta.dim() == 2:
        return a.unsqueeze(1), delta.unsqueeze(1)
    return a, delta


def chunks(rows: Tensor, elements: int) -> tuple[Tensor, ...]:
    """Split ``rows`` so that their gradients of ``elements`` entries each fit the chunk budget."""
    return rows.split(max(1, CHUNK_ELEMENTS // max(1, elements)))


def reference(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    a, delta = with_positions(a, delta)
    T, inputs = sizes(a.shape, window)
    outputs = delta.shape[2]
    a, delta = to_statistics_dtype(a), to_statistics_dtype(delta)
    mean = a.new_zeros((offsets.numel() - 1, outputs, inputs))
    variance = torch.zeros_like(mean)
    for domain, rows in domain_rows(order, offsets):
        m, v, n = mean[domain], variance[domain], rows.numel()
        if T == 1 and not window:
            x, d = a[rows, 0], delta[rows, 0]
            torch.mm(d.t(), x, out=m)
            torch.mm((d * d).t(), x * x, out=v)
            m /= n
            v.div_(n).addcmul_(m, m, value=-1)
            v.copy_(_centred(x, d, m).where(v < m.square() * CANCELS, v))
        else:
            shift = v.clone()  # the mean of the first chunk, around which squares do not cancel
            for k, part in enumerate(chunks(rows, outputs * inputs)):
                g = torch.bmm(delta[part].transpose(1, 2), unfold(a[part], window))
                m += g.sum(0)
                if k == 0:
                    shift = m / len(part)
                v += g.sub_(shift).square_().sum(0)
            m /= n
            v.div_(n).sub_((m - shift).square_())
        if n == 1:
            torch.sub(m, m, out=v)  # 0, or NaN where a value is not finite
    return mean, variance.clamp_(min=0)


def _centred(x: Tensor, d: Tensor, mean: Tensor) -> Tensor:
    """Compute the variance of products around c = d0 x0, of the factors' means.

    .. math:: d x - c = (d - d_0) x + d_0 (x - x_0)
    """
    x0, d0 = x.mean(0, keepdim=True), d.mean(0, keepdim=True)
    own_x, own_d = x - x0, d - d0
    v = (own_d * own_d).t() @ (x * x)
    v += 2 * (own_d * d0).t() @ (x * own_x)
    v += (d0 * d0).t() @ own_x.square().sum(0, keepdim=True)
    return v / len(x) - (mean - d0.t() @ x0).square()


def _fake(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> tuple[Tensor, Tensor]:
    a, delta = with_positions(a, delta)
    shape = (offsets.shape[0] - 1, delta.shape[2], sizes(a.shape, window)[1])
    mean = a.new_empty(shape, dtype=statistic_dtype(a.dtype))
    return mean, torch.empty_like(mean)


def reference_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    a: Tensor,
    delta: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
    of_a: bool,
    window: Sequence[int],
) -> tuple[Tensor, Tensor]:
    dtype, shapes = a.dtype, (a.shape, delta.shape)
    a, delta = with_positions(to_statistics_dtype(a), to_statistics_dtype(delta))
    grad_a = torch.zeros(a.shape if of_a else 0, dtype=a.dtype, device=a.device)
    grad_delta = torch.zeros(delta.shape, dtype=a.dtype, device=delta.device)
    for domain, rows in domain_rows(order, offsets):
        # dL/dg_i = 2/n (g_i - mean) * grad_variance + grad_mean / n
        slope = grad_variance[domain] * (2 / rows.numel())
        level = grad_mean[domain] / rows.numel() - mean[domain] * slope
        if a.shape[1] == 1 and not window:  # g_i is one product, so it need not be formed
            x, d = a[rows, 0], delta[rows, 0]
            grad_delta[rows, 0] = d * ((x * x) @ slope.t()) + x @ level.t()
            if of_a:
                grad_a[rows, 0] = x * ((d * d) @ slope) + d @ level
            continue
        for part in chunks(rows, slope.numel()):
            x, d = unfold(a[part], window), delta[part]
            upstream = torch.bmm(d.transpose(1, 2), x).mul_(slope).add_(level)
            grad_delta[part] = torch.bmm(x, upstream.transpose(1, 2))
            if of_a:
                grad_a[part] = fold(torch.bmm(d, upstream), (len(part), *a.shape[1:]), window)
    if of_a:
        grad_a = grad_a.view(shapes[0])
    return grad_a.to(dtype), grad_delta.to(dtype).view(shapes[1])


def _fake_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    a: Tensor,
    delta: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
    of_a: bool,
    window: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape if of_a else 0), delta.new_empty(delta.shape)


def check(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> tuple[Any, Any, Any]:
    """Return the shape ``(D, O, I)`` of a statistic of every domain."""
    outputs, inputs = checks.outer(a, delta, window)
    return checks.partition(order, offsets, a, "a"), outputs, inputs


def check_rows(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int]
) -> tuple[Any, Any, Any]:
    """`check`, but T may be missing."""
    return check(*with_positions(a, delta), order, offsets, window)


def check_values(a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, *rest: Any) -> None:
    checks.partition_values(order, offsets, a.shape[0])


def check_backward(
    grad_mean: Tensor,
    grad_variance: Tensor,
    a: Tensor,
    delta: Tensor,
    mean: Tensor,
    order: Tensor,
    offsets: Tensor,
    of_a: bool,
    window: Sequence[int],
) -> None:
    shape = check_rows(a, delta, order, offsets, window)
    for name, x in (("grad_mean", grad_mean), ("grad_variance", grad_variance), ("mean", mean)):
        checks.statistic(name, x, statistic_dtype(a.dtype), a, "a")
        checks.shape(name, x, shape, "D, O, I")


def check_values_backward(
    grad_mean: Tensor, grad_variance: Tensor, a: Tensor, delta: Tensor, mean: Tensor, *rest: Any
) -> None:
    check_values(a, delta, *rest)


define(
    "outer_moments(Tensor a, Tensor delta, Tensor order, Tensor offsets, int[] window) "
    "-> (Tensor, Tensor)",
    reference,
    _fake,
    check_rows,
    check_values,
    halves=(),
)
define(
    "outer_moments_backward(Tensor grad_mean, Tensor grad_variance, Tensor a, Tensor delta, "
    "Tensor mean, Tensor order, Tensor offsets, bool of_a, int[] window) -> (Tensor, Tensor)",
    reference_backward,
    _fake_backward,
    check_backward,
    check_values_backward,
    mixed=True,
    halves=(2, 3),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, delta, order, offsets, window = inputs
    ctx.save_for_backward(a, delta, output[0], order, offsets)
    ctx.window = window
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_mean: Tensor | None, grad_variance: Tensor | None
) -> tuple[Tensor | None, ...]:
    a, delta, mean, order, offsets = ctx.saved_tensors
    zero = mean.new_zeros(()).expand_as(mean)  # a penalty on the variance leaves the mean alone
    grad_mean = zero if grad_mean is None else grad_mean
    grad_variance = zero if grad_variance is None else grad_variance
    of_a = ctx.needs_input_grad[0]  # not of the data
    grad_a, grad_delta = call(
        "outer_moments_backward",
        grad_mean,
        grad_variance,
        a,
        delta,
        mean,
        order,
        offsets,
        of_a,
        ctx.window,
    )
    return grad_a if of_a else None, grad_delta, None, None, None


differentiable("outer_moments", _setup, _backward)
not_differentiable(
    "outer_moments_backward",
    "outer_moments is differentiable once. Use its result in one backward.",
)


def outer_moments(
    a: Tensor, delta: Tensor, order: Tensor, offsets: Tensor, window: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    r"""Mean and biased variance, by domain, of the gradients
    :math:`g_i = \sum_t \delta_{it} \otimes a_{it}`.

    .. math:: m_d = \frac1{n_d}\sum_{i\in d} g_i, \qquad
              v_d = \frac1{n_d}\sum_{i\in d} g_i^2 - m_d^2 \ge 0

    Args:
        a: layer inputs ``[N, T, I]``, or ``[N, I]`` where T is 1; with a window the padded input
            ``[N, C, *S]`` of a convolution.
        delta: gradients at the layer's outputs ``[N, T, O]``, or ``[N, O]`` as ``a``, any strides,
            the dtype of ``a``.
        order, offsets: a partition of the samples by domain, as in `moments`.
        window: empty, or ``[*kernel, *stride, *dilation]``; then ``I = C * prod(kernel)``. With
            ``*padding`` at its end ``a`` lacks as many zeros on both sides of each dimension.

    Returns:
        ``(mean, variance)``, each ``[D, O, I]`` in float32, or in float64 for factors in float64;
        zeros for an empty domain. Differentiable once, by recomputation; the gradients of ``a`` and
        ``delta`` have their dtype.

    Precision:
        Factors in bfloat16 and float16 are multiplied as they are: each product is exact, and sums
        and squares are float32. On the CPU, factors in float32 are multiplied in float32. On a GPU,
        they are as in PyTorch's layers: ``torch.set_float32_matmul_precision("high")`` or
        ``"medium"`` (``torch.backends.cudnn.conv.fp32_precision`` of a convolution, ``"tf32"``
        unless set) rounds both factors to TF32, 11 bits: each term of a :math:`g_i` is off by up to
        ``1e-3`` of itself, so a variance below about ``1e-6`` of the squared terms is noise;
        ``"highest"`` takes three TF32 products for each, about as accurate as float32.

        The variance is accurate to rounding of :math:`E[g^2]`: below about ``1e-7`` of
        :math:`m_d^2` it is noise, too. Compiled for the CPU, it is accurate to rounding of the
        :math:`g_i`.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, ``window`` does not
            fit ``a``, or ``order`` and ``offsets`` are no partition.
    """
    return call("outer_moments", a, delta, order, offsets, list(window))
