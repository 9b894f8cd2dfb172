"""``gram``: inner products between the domains' gradients, over all parameters at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import flatten, of_parameter, statistic_dtype

# Elements of all domains that the reference holds in float64 at once (32 MiB).
CHUNK_ELEMENTS = 1 << 22


def reference(gradients: Sequence[Tensor], domains: int) -> Tensor:
    like = gradients[0]
    total = like.new_zeros((domains, domains), dtype=torch.float64)
    for k in range(len(gradients) // domains):
        rows = [g.reshape(-1) for g in of_parameter(gradients, domains, k)]
        size = max(1, CHUNK_ELEMENTS // domains)
        for chunk in zip(*(row.split(size) for row in rows), strict=True):
            part = torch.stack(chunk).double()
            total += part @ part.t()
    return (total.triu() + total.triu(1).t()).to(statistic_dtype(like.dtype))


def _fake(gradients: Sequence[Tensor], domains: int) -> Tensor:
    like = gradients[0]
    return like.new_empty((domains, domains), dtype=statistic_dtype(like.dtype))


define("gram(Tensor[] gradients, int domains) -> Tensor", reference, _fake, checks.gradients)
not_differentiable("gram", "Multiply the gradients with PyTorch's own functions instead.")


def gram(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    r"""Gram matrix of the domains' gradients, summed over all parameters.

    .. math:: K_{de} = \sum_k \langle g_{dk}, g_{ek} \rangle

    Args:
        gradients: a list of tensors for each domain, ``gradients[d][k]`` of parameter k; every
            domain has the same shapes. Views are fine.

    Returns:
        ``[D, D]``, exactly symmetric; float32, or float64 for gradients in float64. Sums are
        carried on in float64 across blocks: the result differs from float64's by about 1e-6 of the
        norms, whatever the number of parameters, and the same bits whatever the number of threads.
        A NaN stays in the rows and columns of its domain. Not differentiable.

    Raises:
        TypeError, ValueError: there is no gradient, the domains differ in shapes, dtype or device,
            or something is not a dense floating-point tensor.
    """
    return call("gram", flatten(gradients), len(gradients))
