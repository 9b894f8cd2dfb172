"""Counts the collectives of a step, and its reads and copies between host and device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from parallel import BASES, DOMAINS
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdg

WRAPS = {
    "AgrSum": fastdg.AgrSum,
    "ANDMask": fastdg.ANDMask,
    "PCGrad": fastdg.PCGrad,
    "Fishr(all)": lambda base, **more: fastdg.Fishr(base, params="all", anneal_steps=0, **more),
    "IGA": fastdg.IGA,
    "GroupDRO": fastdg.GroupDRO,
}
# A wait for the device, or a copy to it, where the tensor is on one
HOST = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu"}
HOST |= {"numpy", "new_tensor", "tensor", "as_tensor"}


class Reads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in HOST:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def a_step(wrap: str, layers: int, rank: int, world: int) -> tuple[dict[str, int], dict[str, int]]:
    """The collectives, and the host's reads and copies, of the third step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))
    opt = WRAPS[wrap](BASES["momentum"](model.parameters()), num_domains=DOMAINS)
    torch.manual_seed(rank)
    for _ in range(3):
        x, y, d = torch.randn(9, 6), torch.arange(9) % 6, torch.arange(9) % DOMAINS
        with Reads() as reads, Collectives() as collectives:
            opt.zero_grad()
            opt.backward(F.cross_entropy(model(x), y, reduction="none"), d)
            opt.step()
    return dict(collectives.seen), dict(reads.seen)
