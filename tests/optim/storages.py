"""Which memory of tensors is alive: what torch's ops have made, Python objects or not."""

from __future__ import annotations

import gc
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Storages(TorchDispatchMode):
    """The storages that ops have made inside; autograd's saved tensors are among them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        gc.freeze()  # so that a collection looks at new objects alone

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return made

    def bytes(self) -> int:
        """The size of those that are alive."""
        gc.collect()
        return sum(size for storage, size in self.seen.values() if not storage.expired())


def held_by(storages: Storages, owners: list[Any]) -> int:
    """Bytes that only ``owners`` keep alive; the list is emptied."""
    before = storages.bytes()
    owners.clear()
    after = storages.bytes()
    gc.unfreeze()
    return before - after
