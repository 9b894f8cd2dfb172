"""Domains of the gradients of a step that come in pairs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._torch import assert_later
from ..core.closures import check_same
from ..domains import readable

ORDER = "Take the domains in the order that opt.order() has drawn, each with its own samples."


def in_pairs(train: Sequence[int], test: Sequence[int]) -> list[int]:
    """Return each train domain and a test domain, these in turn."""
    return [d for k, i in enumerate(train) for d in (i, test[k % len(test)])]


def check_pairs(seen: list[Tensor], made: int, ids: Tensor) -> None:
    """Check the domain of a batch, and add it to those of this step's gradients.

    Gradients come in pairs of a train and a test domain: a train domain comes once, and is no test
    domain of the same step.

    Args:
        seen: domain of each gradient so far, 0-dim; of the present one, too, after its first
            micro-batch.
        made: number of complete gradients.
        ids: domain of each sample ``[N]``.

    Raises:
        ValueError: the batch has several domains, or one that must not come now. On another device
            than the CPU this is asserted there.
    """
    check_same(ids, ids[0], "domains: MLDG takes batches of one domain", ORDER)
    if len(seen) > made:
        problem = "domains: MLDG takes the micro-batches of a gradient from one domain"
        check_same(ids, seen[made].to(ids.device), problem, ORDER)
        return
    others = seen if made % 2 == 0 else seen[::2]
    for other in others:
        differs = other.to(ids.device) != ids[0]
        problem = (
            f"domains: gradient {made} of MLDG's step needs a domain that no earlier one has had"
            if made % 2 == 0
            else f"domains: gradient {made} of MLDG's step needs a test domain, not a train domain"
        )
        if not readable(differs):
            assert_later(differs, f"{problem}. {ORDER}")
        elif not differs:
            raise ValueError(f"{problem}, got domain {int(ids[0])}. {ORDER}")
    seen.append(ids[0])
