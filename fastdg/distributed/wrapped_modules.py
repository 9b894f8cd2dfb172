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
from ..capture.graph_notes import WeakHook
from .sharding import sharded


class WrappedModules:
    """DDP and FSDP2 modules that reduce the gradients of a wrapper's parameters, found as they run.

    Args:
        opt: the wrapper.
    """

    def __init__(self, opt: Optimizer) -> None:
        self.opt = weakref.ref(opt)
        # module -> whether it reduces the gradients of the forwards since the last backward
        self.modules: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self.handles: list[Any] = []
        self._mesh: Any = None  # of FSDP2; False: no mesh
        weakref.finalize(self, _remove, self.handles).atexit = False

    @property
    def parameters(self) -> list[Tensor]:
        """The wrapper's parameters, in its order."""
        opt = self.opt()
        assert opt is not None
        return [p for group in opt.param_groups for p in group["params"]]

    def discover(self) -> None:
        """Hook every module that runs, until `hook_owners_only`."""
        if not self.handles:
            self.handles.append(register_module_forward_pre_hook(WeakHook(self, "_on_forward")))

    def hook_owners_only(self) -> None:
        """Hook the modules found so far, and no others."""
        _remove(self.handles)
        self.handles.extend(
            module.register_forward_pre_hook(WeakHook(self, "_on_forward"))
            for module in self.modules
        )

    def _on_forward(self, module: nn.Module, args: Any) -> None:
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
        """The process group that the modules reduce over; None: the default group."""
        for module in self.modules:
            if isinstance(module, DistributedDataParallel):
                return module.process_group
        if self._mesh is None:
            parts: list[Any] = [p for p in self.parameters if sharded(p)]
            self._mesh = parts[0].device_mesh if parts else False
        return self._mesh.get_group() if self._mesh else None

    def unreduced(self) -> list[Tensor]:
        """Return the parameters whose gradients no module reduced in the last backward."""
        done = {id(p) for m, reduces in self.modules.items() if reduces for p in m.parameters()}
        self.modules.update(dict.fromkeys(list(self.modules), False))
        trained = [p for p in self.parameters if p.requires_grad and not sharded(p)]
        return [p for p in trained if id(p) not in done]

    def check(self, name: str) -> None:
        """Raise if a module reduces gradients in an unsupported way."""
        for module in self.modules:
            if getattr(module, "static_graph", False):
                raise RuntimeError(
                    f"{name}: DistributedDataParallel(static_graph=True) is not supported, since "
                    "it takes the first backward, which may be for statistics, for the training "
                    "step. Omit static_graph."
                )
            if type(module).__name__ == "FullyShardedDataParallel":
                raise RuntimeError(
                    f"{name}: FullyShardedDataParallel is not supported, since it merges many "
                    "parameters into one flat parameter. Use torch.distributed.fsdp.fully_shard."
                )
        parts: list[Any] = [p for p in self.parameters if sharded(p)]
        if parts and not any(isinstance(module, _fsdp()) for module in self.modules):
            raise RuntimeError(
                f"{name}: the parameters are DTensors, but no module under fully_shard has run. "
                "Use fully_shard; tensor parallelism is not supported."
            )
        for p in parts:
            if p.device_mesh.ndim > 1 or not p.placements[0].is_shard(0):
                raise RuntimeError(
                    f"{name}: expected parameters sharded in dimension 0 on a 1-dim mesh, got "
                    f"{p.placements} on a mesh of {p.device_mesh.ndim} dimensions. Use fully_shard "
                    "with a 1-dim mesh."
                )

    # -- FSDP2 --

    def pause_sync(self) -> None:
        """Turn off FSDP2's gradient reduction and resharding until `resume_sync`.

        FSDP2 gathers all parameters now and keeps them: a second derivative needs them again, and
        ranks may run different numbers of statistics backwards.
        """
        for module in self._set(False):
            module.unshard()

    def resume_sync(self) -> None:
        """Turn on FSDP2's gradient reduction and resharding, for the training step."""
        self._set(True)

    def reshard(self) -> None:
        """Free the gathered parameters."""
        for module in self._set(True):
            module.reshard()

    def _set(self, training: bool) -> list[Any]:
        if not self.modules:  # ten times as fast as an empty loop over weak references
            return []
        modules: list[Any] = [m for m in self.modules if hasattr(m, "set_reshard_after_backward")]
        for module in modules:
            module.set_requires_gradient_sync(training, recurse=False)
            module.set_reshard_after_backward(training, recurse=False)
        return modules


def _fsdp() -> tuple[type, ...]:
    """Return the FSDP module classes; () if FSDP is not imported."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    if loaded is None:
        return ()
    return loaded.FSDPModule, loaded.FullyShardedDataParallel


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
