"""What a module holds: parameters of its own, modules inside it, and what FSDP2 has gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """``(local name, parameter)`` of what is the module's own, under a parametrization or not."""
    own = [(local, p) for local, p in module._parameters.items() if p is not None]
    if (hidden := module._modules.get("parametrizations")) is not None:
        own += hidden.named_parameters("parametrizations")
    return own


def reshard(model: nn.Module) -> None:
    """Let FSDP2 let go of what it has gathered. After a forward without a backward it keeps that of
    the outermost module, shows it in place of this rank's part, and would not gather it anew."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "set_reshard_after_backward")]
    for module in modules:
        module.reshard()


def contents(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside ``module`` that are not part of how its own weights are made."""
    for name, child in module._modules.items():
        if child is not None and name != "parametrizations":
            yield child
            yield from contents(child)
