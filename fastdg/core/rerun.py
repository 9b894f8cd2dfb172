"""Run the user's code a second time from the same random states and buffers."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from ..capture.graph_notes import WeakHook
from ..statistics.random_state import random_state
from ..statistics.random_state import restore as restore_random


class Buffers:
    """Snapshot of the buffers of modules."""

    def __init__(self) -> None:
        self.saved: dict[tuple[int, str], tuple[nn.Module, Tensor, Tensor]] = {}
        self._seen: set[int] = set()
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles).atexit = False

    def record(
        self, model: nn.Module | None = None, owned: Collection[Tensor] | None = None
    ) -> None:
        """Save the buffers of ``model``.

        By default save the buffers of every module before it runs, until `restore` or `stop`; of
        modules that have some of the parameters ``owned``, if these are given.
        """
        if model is not None:
            self._save(model)
            return
        hook = WeakHook(self, "_on_forward")
        self.owned = None if owned is None else {id(p) for p in owned}
        self._handles.append(torch_module.register_module_forward_pre_hook(hook))

    def stop(self) -> None:
        _remove(self._handles)

    def _on_forward(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._seen:
            return
        if self.owned is None or any(id(p) in self.owned for p in module.parameters()):
            self._save(module)

    def _save(self, model: nn.Module) -> None:
        # With all modules inside, as the modules of a compiled module call no hook
        for module in model.modules():
            self._seen.add(id(module))
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


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
