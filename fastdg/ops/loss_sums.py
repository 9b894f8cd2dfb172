"""``loss_sums``: the samples of a batch sorted by domain, and the sums of their losses."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .dispatch.derivatives import call, not_differentiable
from .dispatch.registry import define
from .gradients import statistic_dtype

Sums = tuple[Tensor, Tensor, Tensor, Tensor]


def reference(losses: Tensor, domains: Tensor, num_domains: int) -> Sums:
    ascending, order = torch.sort(domains, stable=True)
    numbers = torch.arange(num_domains + 1, device=domains.device)
    offsets = torch.searchsorted(ascending, numbers)
    # Adds in one order: `index_add` may add in any order on a GPU
    rows = losses.to(torch.float64).where(domains == numbers[:-1].unsqueeze(1), 0)
    return order, offsets, offsets.diff(), rows.sum(1).to(statistic_dtype(losses.dtype))


def _fake(losses: Tensor, domains: Tensor, num_domains: int) -> Sums:
    return (
        domains.new_empty(domains.shape),
        domains.new_empty(num_domains + 1),
        domains.new_empty(num_domains),
        losses.new_empty(num_domains, dtype=statistic_dtype(losses.dtype)),
    )


def check(losses: Tensor, domains: Tensor, num_domains: int) -> None:
    checks.floating("losses", losses)
    checks.dims("losses", losses, "[N]", 1)
    checks.vector("domains", domains, torch.int64, losses, "losses")
    checks.shape("domains", domains, losses.shape, "as losses")
    if not 1 <= num_domains <= checks.LARGEST_SIDE:
        raise ValueError(f"num_domains: expected 1 to 2**28, got {num_domains}. Pass D.")


def check_values(losses: Tensor, domains: Tensor, num_domains: int) -> None:
    checks.domain_values(domains, num_domains)


define(
    "loss_sums(Tensor losses, Tensor domains, int num_domains) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    _fake,
    check,
    check_values,
    halves=(),
)
not_differentiable("loss_sums", "Pass losses.detach().")


def loss_sums(losses: Tensor, domains: Tensor, num_domains: int) -> Sums:
    r"""Sort the samples of a batch by domain, and sum the losses of each domain.

    .. math:: s_d = \sum_{i\in d} \ell_i

    Args:
        losses: ``[N]``, floating point.
        domains: domain of each sample, ``[N]`` int64, on the device of the losses.
        num_domains: D.

    Returns:
        ``(order, offsets, count, sums)``: the samples sorted by domain, stable, ``[N]`` int64;
        the place where each domain begins, and N, ``[D + 1]`` int64; samples of each domain,
        ``[D]`` int64; sums ``[D]`` in float32, or in float64 for losses in float64, added in
        float64. Not differentiable.

    Raises:
        TypeError, ValueError: an argument is not as described, or (read on the CPU alone) a domain
            is not in 0 to D - 1.
    """
    return call("loss_sums", losses, domains, num_domains)
