"""Run the user's code a second time from the same random states and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from ..statistics.random_state import random_state
from ..statistics.random_state import restore as restore_random


class Buffers:
    """Snapshot of the buffers of modules."""

    def __init__(self) -> None:
        self.saved: dict[tuple[int, str], tuple[nn.Module, Tensor, Tensor]] = {}
        self._handle: RemovableHandle | None = None

    def record(self, model: nn.Module | None = None) -> None:
        """Save the buffers of ``model``; by default those of every module before it runs, until
        `restore` or `stop`."""
        if model is None:
            self._handle = torch_module.register_module_forward_pre_hook(self._note)
            return
        for module in model.modules():
            self._note(module, ())

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _note(self, module: nn.Module, args: Any) -> None:
        for name, buffer in module._buffers.items():
            key = id(module), name
            if buffer is not None and key not in self.saved:
                self.saved[key] = module, buffer, buffer.clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers."""
        self.stop()
        for (_, name), (module, buffer, value) in self.saved.items():
            buffer.copy_(value)
            module._buffers[name] = buffer  # some modules replace theirs


class RngAndBuffers:
    """Snapshot of the random states and of module buffers.

    Args:
        device: device of the model; its generator and the CPU's are restored.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.random = device, random_state("different", device)
        self.buffers = Buffers()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Save the buffers of every module that runs inside, before it runs."""
        self.buffers.record()
        try:
            yield
        finally:
            self.buffers.stop()

    def restore(self) -> None:
        """Restore the random states and the buffers."""
        restore_random(self.random, self.device)
        self.buffers.restore()
