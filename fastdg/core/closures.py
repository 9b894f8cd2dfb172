"""Batches of one domain: closures that are asked for one, and a check."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import assert_later
from ..domains import as_ids, readable
from .base_optimizer import check_result


def asks_for_domain(closure: Callable[..., Any]) -> bool:
    """Whether a closure has a parameter to be given, which is the domain it shall run."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return any(
        p.kind in kinds and p.default is inspect.Parameter.empty
        for p in inspect.signature(closure).parameters.values()
    )


def losses_of(result: Any, domain: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Losses, domain ids and further inputs from what ``closure(domain)`` returned: all, the first
    two, or the losses alone."""
    if isinstance(result, Tensor):
        return result, torch.full(result.shape, domain), {}
    losses, domains, inputs = check_result(result)
    samples = losses.numel() if isinstance(losses, Tensor) else None
    return losses, as_ids(domains, samples), inputs


def check_same(domains: Tensor, domain: Tensor | int, message: str) -> None:
    """Raise ValueError unless all ``domains`` are ``domain``.

    On the device where they are: what is not on the CPU is asserted there, without a wait.
    """
    same = (domains == domain).all()
    if not readable(same):
        assert_later(same, message)
    elif not same:
        got = sorted(set(domains.tolist()))
        raise ValueError(f"{message}; got domains {got[:8]}")


def together(seen: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The statistics of several inner steps as those of one."""
    counts = torch.stack([s["domain_count"] for s in seen])
    losses = torch.stack([s["domain_loss"] for s in seen])
    count = counts.sum(0)
    total = (losses.where(counts > 0, 0) * counts).sum(0)
    return {
        "loss": torch.stack([s["loss"] for s in seen]).mean(),
        "domain_loss": total / count.to(total.dtype),
        "domain_count": count,
    }
