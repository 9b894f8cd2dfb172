"""The tensors that a forward under FSDP2 uses in place of the optimizer's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from .._torch import fsdp_parameters


def leaf_of(modules: Callable[[], Iterable[nn.Module]]) -> Callable[[Tensor], Tensor]:
    """Parameter -> the tensor that a forward of ``modules`` uses as it; itself if not sharded."""

    def leaf(p: Tensor) -> Tensor:
        if not hasattr(p, "device_mesh"):
            return p
        for module in modules():
            for sharded, gathered in fsdp_parameters(module):
                if sharded is p and gathered is not None:
                    return gathered
        return p

    return leaf
