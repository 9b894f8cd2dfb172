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
    """Snapshot of the buffers of modules.

    With ``torch.func.functional_call`` a module has other buffers during a forward: these are
    restored, and the module keeps its own.
    """

    def __init__(self) -> None:
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}  # id -> buffer, its values
        self._present: dict[tuple[nn.Module, str], Tensor] = {}  # before a module's last forward
        self._origins: dict[int, tuple[Tensor, Tensor]] = {}  # id -> made by a forward, first
        self._seen: set[nn.Module] = set()  # modules whose buffers are saved
        self._outermost: set[nn.Module] = set()  # those that called a hook first
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
        before, after = WeakHook(self, "_before_forward"), WeakHook(self, "_after_forward")
        self.owned = None if owned is None else {id(p) for p in owned}
        self._handles += [
            torch_module.register_module_forward_pre_hook(before),
            torch_module.register_module_forward_hook(after),
        ]

    def stop(self) -> None:
        _remove(self._handles)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if module in self._seen and module not in self._outermost:
            self._save_own(module)
        elif self.owned is None or any(id(p) in self.owned for p in module.parameters()):
            self._outermost.add(module)
            self._save(module)

    def _save(self, model: nn.Module) -> None:
        # With all modules inside, as the modules of a compiled module call no hook
        for module in model.modules():
            self._seen.add(module)
            self._save_own(module)

    def _save_own(self, module: nn.Module) -> None:
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            self._present[module, name] = buffer
            if id(buffer) not in self._origins and id(buffer) not in self.saved:
                self.saved[id(buffer)] = buffer, buffer.clone()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note buffers that a forward has replaced, as some modules do."""
        for place in module.modules() if module in self._outermost else (module,):
            for name, buffer in place._buffers.items():
                before = self._present.get((place, name))
                if buffer is None or before is None or buffer is before:
                    continue
                _, first = self._origins.get(id(before), (before, before))
                self._origins[id(buffer)] = buffer, first

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers."""
        self.stop()
        for buffer, value in self.saved.values():
            buffer.copy_(value)
        for (module, name), before in self._present.items():
            now = module._buffers.get(name)
            if not self._outermost:  # of a given model, whose forwards call no hook
                module._buffers[name] = before
            elif id(now) in self._origins:
                module._buffers[name] = self._origins[id(now)][1]


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
