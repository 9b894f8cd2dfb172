"""A wrapper's own state, inside that of the optimizer it wraps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from . import loading
from .loading import Kept
from .wrapped import Wrapping


class Stateful(Wrapping):
    """Keeps tensors beside the wrapped optimizer's, and settings and counters in its first group.

    Own tensors are copied and loaded in the dtype that they have, whatever that of the parameter.
    """

    tensors: tuple[str, ...] = ()  # names of per-parameter tensors the algorithm keeps
    _names: dict[Tensor, str]
    _kept: Kept
    _given: dict[str, Any]  # what the first group holds where a loaded state says nothing
    _loading = False

    def _clear(self) -> None:
        """Forget what was staged, and what belongs to the run so far."""

    def _new(self) -> Kept:
        """Own tensors as a new run has them, if their shapes are known before any forward."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state with the wrapper's own in it; see `load_state_dict`."""
        own = list(self._own_tensors())
        # Own tensors may be ahead of the wrapped optimizer's (from loading to the next step). And
        # who has entries for some parameters must have them for all: torch.distributed.checkpoint
        early = [p for g in self.param_groups for p in g["params"] if own and not self.state.get(p)]
        self.state.update({p: {} for p in early})
        for p, name, tensor in own:
            self.state[p][name] = tensor
        try:
            return super().state_dict()
        finally:
            for p in early:
                del self.state[p]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this wrapper, or by the bare wrapped optimizer.

        From the latter the wrapper's own state starts anew, with the constructor's settings.
        Loading through ``opt.base`` does the same.

        Raises:
            ValueError: the state was saved with another number of domains, or lacks tensors it
                should have. Nothing is changed then.
        """
        rest = self._take(loading.prepared(self, state_dict))
        self._loading = True  # so that the hooks of `loading` do not take it again
        try:
            self.base.load_state_dict(rest)
        finally:
            self._loading = False
        self._taken()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _take(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What the wrapped optimizer shall load of this state; the wrapper's own is set aside."""
        state_dict = loading.without_others(self, state_dict)
        groups = state_dict["param_groups"]
        named = loading.by_id(groups, (p for g in self.param_groups for p in g["params"]))
        own = {f"{self.prefix}_{name}": name for name in self.tensors}
        # torch would cast our fp32 tensors to the parameters' dtype: they do not go through it
        self._loaded, rest = loading.split(state_dict["state"], named, own)
        if sum(len(group["params"]) for group in groups) == self._size():  # or it is refused there
            self._admit(self._loaded, groups)
        return {**state_dict, "state": rest}

    def _taken(self) -> None:
        """The wrapped optimizer has loaded its part: now the wrapper does."""
        self._kept, self._loaded = self._loaded, {}
        for p, name, tensor in self._own_tensors():
            if self.state.get(p):  # an entry of ours alone would pass for the wrapped optimizer's
                self.state[p][name] = tensor
        self._clear()
        self._fill()

    def _admit(
        self, kept: dict[str, dict[Tensor, Tensor]], groups: Sequence[dict[str, Any]]
    ) -> None:
        """Refuse a state that does not fit, before anything is changed."""

    def _fill(self) -> None:
        """Give the first group what it lacks of the wrapper's settings and counters."""
        for name, value in self._given.items():
            self.param_groups[0].setdefault(f"{self.prefix}_{name}", value)

    def _own_tensors(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        for name, tensors in self._kept.items():
            for p, tensor in tensors.items():
                yield p, f"{self.prefix}_{name}", tensor
        if isinstance(self.base, Stateful):  # a term
            yield from self.base._own_tensors()
