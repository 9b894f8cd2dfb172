"""The modules that reduce gradients over ranks: DistributedDataParallel and FSDP2."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .._torch import original
from ..capture.graph_notes import Hook
from .sharding import sharded


class WrappedModules:
    """Those which reduce the gradients of a wrapper's parameters, found as they run.

    Args:
        opt: the wrapper.
    """

    def __init__(self, opt: Optimizer) -> None:
        self.opt = weakref.ref(opt)
        # -> whether it will reduce those of the forwards since the last backward
        self.modules: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self.handles: list[Any] = []
        self._mesh: Any = None  # of FSDP2; False: there is none
        weakref.finalize(self, _remove, self.handles).atexit = False

    @property
    def parameters(self) -> list[Tensor]:
        """The wrapper's, in its order."""
        opt = self.opt()
        assert opt is not None
        return [p for group in opt.param_groups for p in group["params"]]

    def discover(self) -> None:
        """Look at every module that runs, until `hook_owners_only`."""
        if not self.handles:
            self.handles.append(register_module_forward_pre_hook(Hook(self, "_see")))

    def hook_owners_only(self) -> None:
        """Look at those alone that are known now."""
        _remove(self.handles)
        self.handles.extend(
            module.register_forward_pre_hook(Hook(self, "_see")) for module in self.modules
        )

    def _see(self, module: nn.Module, args: Any) -> None:
        module = original(module)
        engine = isinstance(module, (DistributedDataParallel, *_fsdp()))
        if not engine or not torch.is_grad_enabled():
            return
        if module not in self.modules and not isinstance(module, _fsdp()):
            trained = {id(p) for p in self.parameters}
            if all(id(p) not in trained for p in module.parameters()):
                return
        syncs = getattr(module, "require_backward_grad_sync", False)
        self.modules[module] = self.modules.get(module, False) or syncs

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The ranks that they reduce over; None: the default group."""
        for module in self.modules:
            if isinstance(module, DistributedDataParallel):
                return module.process_group
        if self._mesh is None:
            parts: list[Any] = [p for p in self.parameters if sharded(p)]
            self._mesh = parts[0].device_mesh if parts else False
        return self._mesh.get_group() if self._mesh else None

    def left(self) -> list[Tensor]:
        """Parameters whose gradients no module has reduced in the backward that was."""
        done = {id(p) for m, reduces in self.modules.items() if reduces for p in m.parameters()}
        self.modules.update(dict.fromkeys(list(self.modules), False))
        trained = [p for p in self.parameters if p.requires_grad and not sharded(p)]
        return [p for p in trained if id(p) not in done]

    def check(self, name: str) -> None:
        """Raise if the gradients are reduced in a way that this does not go along with."""
        for module in self.modules:
            if getattr(module, "static_graph", False):
                raise RuntimeError(
                    f"{name}: DistributedDataParallel(static_graph=True) takes the first "
                    "backward pass of any kind for that of the training step; leave it out"
                )
            if type(module).__name__ == "FullyShardedDataParallel":
                raise RuntimeError(
                    f"{name}: FullyShardedDataParallel makes one flat parameter of many, "
                    "whose statistics are not known; use torch.distributed.fsdp.fully_shard"
                )
        parts: list[Any] = [p for p in self.parameters if sharded(p)]
        if parts and not any(isinstance(module, _fsdp()) for module in self.modules):
            raise RuntimeError(
                f"{name}: its parameters are DTensors, but no module under fully_shard has "
                "run; tensor parallelism is not supported"
            )
        for p in parts:
            if p.device_mesh.ndim > 1 or not p.placements[0].is_shard(0):
                raise RuntimeError(
                    f"{name}: a parameter lies as {p.placements} on a mesh of "
                    f"{p.device_mesh.ndim} dimensions; only fully_shard on a mesh of one "
                    "dimension, along the first dimension of the parameters, is supported"
                )

    # -- FSDP2 --

    def pause_sync(self) -> None:
        """Backward passes from now on are for statistics, until `resume_sync`.

        FSDP2 is to reduce nothing, and to gather all parameters now and keep them: a second
        derivative needs them again, and the passes need not be as many on every rank.
        """
        for module in self._set(False):
            module.unshard()

    def resume_sync(self) -> None:
        """The next backward is that of the training step."""
        self._set(True)

    def reshard(self) -> None:
        """What was kept is needed no more."""
        for module in self._set(True):
            module.reshard()

    def _set(self, training: bool) -> list[Any]:
        modules: list[Any] = [m for m in self.modules if hasattr(m, "set_reshard_after_backward")]
        for module in modules:
            module.set_requires_gradient_sync(training, recurse=False)
            module.set_reshard_after_backward(training, recurse=False)
        return modules


def _fsdp() -> tuple[type, ...]:
    """What FSDP makes of modules, if it was imported."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return ()
    return loaded.FSDPModule, loaded.FullyShardedDataParallel


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
