"""``combine_rows``: a weighted sum of the rows of each tensor, for all parameters at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .combine import weighted_sum
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import in_dtype_of, statistic_dtype


def reference(rows: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    dtype = rows[0].dtype
    weights = weights.to(statistic_dtype(dtype))
    return [weighted_sum(x.unbind(), weights).to(dtype) for x in rows]


def _fake(rows: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape[1:]) for x in rows]


def check(rows: Sequence[Tensor], weights: Tensor) -> None:
    if len(rows) == 0:
        raise ValueError("rows: expected at least one tensor, got none. Pass one a parameter.")
    first = rows[0]
    checks.floating("rows[0]", first)
    checks.alike("rows", rows, first, "rows[0]")
    checks.floating("weights", weights)
    checks.dims("weights", weights, "[D]", 1)
    checks.on_device("weights", weights, first, "rows[0]")
    D = weights.shape[0]
    if D == 0:
        raise ValueError("weights: expected at least one, got none. Pass one a row.")
    for k, x in enumerate(rows):
        if x.dim() == 0 or x.shape[0] != D:
            raise ValueError(
                f"rows[{k}]: expected a row for each of the {D} weights, got shape "
                f"{tuple(x.shape)}. Pass tensors [D, *]."
            )


define(
    "combine_rows(Tensor[] rows, Tensor weights) -> Tensor[]", reference, _fake, check, mixed=True
)
not_differentiable("combine_rows", "Add the rows with PyTorch's own functions instead.")


def combine_rows(rows: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    r"""`combine` of gradients that lie in one tensor for each parameter, a row for each domain.

    .. math:: g_k = \sum_d w_d\, G_{k,d}

    Args:
        rows: one tensor ``[D, *shape]`` for each parameter, of one dtype and on one device.
        weights: ``[D]``, floating point, on the device of the rows; taken in their dtype. A weight
            of 0 is a factor like any other: NaN and inf come through.

    Returns:
        One contiguous tensor ``[*shape]`` for each parameter. Not differentiable.

    Raises:
        TypeError, ValueError: there is no tensor or no weight, one has other rows, dtype or device
            than the first, or something is not a dense floating-point tensor.
    """
    rows = list(rows)
    return call("combine_rows", rows, in_dtype_of(rows[0], weights) if rows else weights)
