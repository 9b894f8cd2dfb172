"""Run the user's code a second time, with the same random numbers and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..statistics.random_state import random_state
from ..statistics.random_state import restore as restore_random


class RngAndBuffers:
    """Snapshot of the random states and of module buffers.

    Args:
        device: device of the model; its generator and the CPU's are restored.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.random = device, random_state("different", device)
        self.buffers: dict[tuple[int, str], tuple[nn.Module, Tensor, Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Save the buffers of every module that runs inside, before it runs."""
        handle = torch_module.register_module_forward_pre_hook(self._note)
        try:
            yield
        finally:
            handle.remove()

    def _note(self, module: nn.Module, args: Any) -> None:
        for name, buffer in module._buffers.items():
            key = id(module), name
            if buffer is not None and key not in self.buffers:
                self.buffers[key] = module, buffer, buffer.clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the random states and the buffers."""
        restore_random(self.random, self.device)
        for (_, name), (module, buffer, value) in self.buffers.items():
            buffer.copy_(value)
            module._buffers[name] = buffer  # some modules replace theirs
