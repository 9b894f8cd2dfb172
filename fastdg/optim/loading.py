"""Loading a state: the wrapper's own part of it goes to the wrapper, the rest to what it wraps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

Kept = dict[str, dict[Tensor, Tensor]]


class _Wrapper(Protocol):
    _loading: bool

    def _take(self, state_dict: dict[str, Any]) -> dict[str, Any]: ...

    def _taken(self) -> None: ...


class Loading:
    """Hooks of the wrapped optimizer, so that a state loaded into it reaches its wrapper too.

    They know the wrapper by a weak reference, and a copy of them knows none: a wrapper lives as
    long as its user wants, and one that is copied hooks itself onto its own optimizer.
    """

    def __init__(self, wrapper: _Wrapper | None = None) -> None:
        self.wrapper = weakref.ref(wrapper) if wrapper is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Loading, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Loading:
        return Loading()

    def _idle(self) -> _Wrapper | None:
        wrapper = self.wrapper() if self.wrapper is not None else None
        return None if wrapper is None or wrapper._loading else wrapper

    def before(self, base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        wrapper = self._idle()
        return wrapper._take(state_dict) if wrapper is not None else None

    def after(self, base: Optimizer) -> None:
        wrapper = self._idle()
        if wrapper is not None:
            wrapper._taken()


def attach(wrapper: Any) -> None:
    """Follow what is loaded into ``wrapper.base``, for as long as the wrapper lives."""
    if not hasattr(wrapper.base, "_optimizer_load_state_dict_pre_hooks"):
        return  # a wrapper itself, of the kind that never calls Optimizer.__init__
    hooks = Loading(wrapper)
    for handle in (
        wrapper.base.register_load_state_dict_pre_hook(hooks.before),
        wrapper.base.register_load_state_dict_post_hook(hooks.after),
    ):
        weakref.finalize(wrapper, handle.remove).atexit = False


def split(
    state: Mapping[Any, dict[str, Any]], named: Mapping[Any, Tensor], own: Mapping[str, str]
) -> tuple[Kept, dict[Any, Any]]:
    """The wrapper's tensors, copied and in the dtype they were saved in, and the rest.

    Args:
        state: of a state dict.
        named: id there -> parameter.
        own: key of the wrapper's in an entry -> the tensor's name.
    """
    kept: Kept = {name: {} for name in own.values()}
    rest: dict[Any, Any] = {}
    for i, entry in state.items():
        if i in named:
            p = named[i]
            for key in own.keys() & entry.keys():
                kept[own[key]][p] = entry[key].detach().to(p.device, copy=True)
            entry = {key: value for key, value in entry.items() if key not in own}
        if entry:
            rest[i] = entry
    return kept, rest


def by_id(groups: Sequence[Mapping[str, Any]], parameters: Iterable[Tensor]) -> dict[Any, Tensor]:
    """Id in a state dict's ``groups`` -> parameter.

    Ids may be names (torch.distributed.checkpoint): the order of the groups says which is who.
    """
    ids = [i for group in groups for i in group["params"]]
    return dict(zip(ids, parameters, strict=False))
