r"""``attention_maps``: the maps of queries by keys in the derivative of attention's backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch import safe_softmax
from .. import checks
from ..dispatch.derivatives import call, not_differentiable
from ..dispatch.registry import define


def reference(
    scores: Tensor, of_weights: Tensor, up: Tensor, direct: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = safe_softmax(scores, -1)

    def drawn(slope: Tensor) -> Tensor:
        """The gradient by the scores of a function with this gradient by the weights."""
        return weights * (slope - (weights * slope).sum(-1, keepdim=True))

    level = (weights * of_weights).sum(-1, keepdim=True)
    up_level = (weights * up).sum(-1, keepdim=True)
    slope = up * (of_weights - level) - up_level * of_weights + direct
    maps = weights, weights * (of_weights - level), drawn(up), drawn(slope)
    of_scores, of_up = maps[1], maps[2]
    return tuple(x.to(dtype) for x in (weights, of_scores, of_up, maps[3]))  # type: ignore[return-value]


def _fake(
    scores: Tensor, of_weights: Tensor, up: Tensor, direct: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, two, three, four = (scores.new_empty(scores.shape, dtype=dtype) for _ in range(4))
    return one, two, three, four


def check(
    scores: Tensor, of_weights: Tensor, up: Tensor, direct: Tensor, dtype: torch.dtype
) -> None:
    checks.floating("scores", scores)
    checks.dims("scores", scores, "[B, T, S]", 3)
    for name, other in (("of_weights", of_weights), ("up", up), ("direct", direct)):
        checks.floating(name, other, scores, "scores")
        checks.shape(name, other, scores.shape, "as scores")


define(
    "attention_maps(Tensor scores, Tensor of_weights, Tensor up, Tensor direct, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
    check,
)
not_differentiable(
    "attention_maps",
    "Fused attention has no third derivative: run the model under "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH).",
)


def attention_maps(
    scores: Tensor, of_weights: Tensor, up: Tensor, direct: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Maps from which `attention_derivative` makes its gradients.

    With the weights :math:`P = \mathrm{softmax}(Z)` of scores Z, the gradient A at P, and row sums
    :math:`\langle \cdot, \cdot\rangle`:

    .. math:: A_Z = P (A - \langle P, A\rangle), \quad U_A = P (U - \langle P, U\rangle), \quad
              W = U (A - \langle P, A\rangle) - \langle P, U\rangle A + E, \quad
              Z^* = P (W - \langle P, W\rangle)

    Args:
        scores: Z ``[B, T, S]``, float32 or float64; -inf where a query may not see a key. A row of
            -inf alone has weights 0.
        of_weights: A, as ``scores``.
        up: U, the gradient that comes back to :math:`A_Z`, as ``scores``.
        direct: E, the gradient that comes back to P itself, as ``scores``.
        dtype: of the results.

    Returns:
        ``(P, A_Z, U_A, Z*)``, each ``[B, T, S]``. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device.
    """
    return call("attention_maps", scores, of_weights, up, direct, dtype)
