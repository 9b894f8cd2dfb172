"""Unsharded tensors of FSDP2 forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from .._torch import fsdp_parameters


def leaf_of(modules: Callable[[], Iterable[nn.Module]]) -> Callable[[Tensor], Tensor]:
    """Return a function from a parameter to its tensor in a forward of ``modules``."""

    def leaf(p: Tensor) -> Tensor:
        if not hasattr(p, "device_mesh"):
            return p
        for module in modules():
            for sharded, gathered in fsdp_parameters(module):
                if sharded is p and gathered is not None:
                    return gathered
        return p

    return leaf
