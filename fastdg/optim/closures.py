"""Batches of one domain: what a closure returns that is asked for one, and a check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .wrapped import check_result


def losses_of(result: Any, domain: int) -> tuple[Tensor, Tensor]:
    """Losses and domain ids from what ``closure(domain)`` returned: both, or the losses alone."""
    if isinstance(result, Tensor):
        return result, torch.full(result.shape, domain)
    return check_result(result)


def check_same(domains: Tensor, domain: Tensor | int, message: str) -> None:
    """Raise ValueError unless all ``domains`` are ``domain``.

    On the device where they are: what is not on the CPU is asserted there, without a wait.
    """
    same = (domains == domain).all()
    if same.device.type != "cpu":
        torch._assert_async(same, message)
    elif not same:
        got = sorted(set(domains.tolist()))
        raise ValueError(f"{message}; got domains {got[:8]}")
