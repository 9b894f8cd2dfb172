"""The tensors that a forward under FSDP2 uses in place of the optimizer's parameters.

FSDP2 has no public way from a sharded parameter to the gathered one, whose gradient a backward
makes; ``FSDPModule._get_fsdp_state`` is the way that its own ``unshard`` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def leaf_of(modules: Callable[[], Iterable[nn.Module]]) -> Callable[[Tensor], Tensor]:
    """Parameter -> the tensor that a forward of ``modules`` uses as it; itself if not sharded."""

    def leaf(p: Tensor) -> Tensor:
        if not hasattr(p, "device_mesh"):
            return p
        for module in modules():
            for held in _parameters(module):
                if held.sharded_param is p and hasattr(held, "_unsharded_param"):
                    return held._unsharded_param
        return p

    return leaf


def _parameters(module: Any) -> Iterable[Any]:
    """What FSDP2 keeps of the parameters that ``module`` gathers."""
    if not hasattr(module, "_get_fsdp_state"):
        return ()
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return [held for group in groups for held in group.fsdp_params]
