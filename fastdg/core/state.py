"""A wrapper's own state, inside that of the optimizer it wraps."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import dataclass_transform

from .._torch import optimizer_hooks
from . import base_state, checkpoint
from .base_optimizer import Wrapping
from .declared_state import DOMAINS, DeclaredState, declared_state
from .hyper import argument
from .nesting import chain


# To type checkers the arguments that a wrapper declares are the fields of a dataclass
@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(argument,))
class Stateful(checkpoint.Keeping):
    """Keeps tensors beside the wrapped optimizer's, and settings and counters in its first group.

    Own tensors are copied and loaded in the dtype that they have, whatever that of the parameter.
    """

    _loaded_groups: Sequence[dict[str, Any]] = ()
    _given: dict[str, Any]  # what the first group holds where a loaded state says nothing

    def _clear(self) -> None:
        """Forget what was staged, and what belongs to the run so far."""

    @property
    def _declared(self) -> DeclaredState:
        return declared_state(type(self))

    def _known_domains(self) -> int:
        """How many domains own state knows of already."""
        kept = [self._own_state[x.key] for x in self._declared.tensors if x.rows is DOMAINS]
        return max((len(tensor) for tensors in kept for tensor in tensors.values()), default=0)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's own ``state_dict()`` with the wrapper's state in it.

        Where that is not laid out as PyTorch's are, the wrapper's lies under ``"fastdg"``.

        Raises:
            RuntimeError: torch.distributed.checkpoint asks for it, and would lose a part.
        """
        checkpoint.catch_up(self)
        for pre_hook in (optimizer_hooks(self, "state_dict_pre") or {}).values():
            pre_hook(self)
        self._remember()
        prefixes = tuple(f"{link.prefix}_" for link in chain(self))
        name = type(self.base).__name__
        saved = self.base.state_dict()
        state = base_state.with_own(
            saved, self.param_groups, list(self._own_tensors()), prefixes, name
        )
        for post_hook in (optimizer_hooks(self, "state_dict_post") or {}).values():
            changed = post_hook(self, state)
            state = state if changed is None else changed
        return state

    def _remember(self) -> None:
        """Write down in ``param_groups`` what is kept elsewhere, before it is saved."""
        for state in self._declared.objects:
            value = state.read(self)
            if value is not None or state.fresh:
                self.param_groups[0][f"{self.prefix}_{state.key}"] = value

    def _note_objects(self) -> None:
        """Keep the states of objects before a step that a GradScaler may skip."""
        if self._loss_scale.scaler is not None and self._before is None:
            self._before = {state.key: state.read(self) for state in self._declared.objects}

    def _skip(self) -> None:
        for state in self._declared.objects:
            if self._before and self._before[state.key] is not None:
                state.write(self, self._before[state.key])
        self._remember()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this wrapper, or by the bare wrapped optimizer.

        From the latter the wrapper's own state starts anew, with the constructor's settings.
        Loading through ``opt.base`` does the same.

        Raises:
            ValueError: the state was saved with another number of domains, or lacks tensors it
                should have. Nothing is changed then.
        """
        state_dict = checkpoint.prepared(self, state_dict)
        rest = self._split_state(state_dict)
        checkpoint.check_complete(self, state_dict, rest)
        self._loading = True  # so that the hooks of `loading` do not take it again
        try:
            self.base.load_state_dict(rest)
        finally:
            self._loading = False
        self._finish_load()
        for post_hook in (optimizer_hooks(self, "load_state_dict_post") or {}).values():
            post_hook(self)

    def _split_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What the wrapped optimizer shall load of this state; the wrapper's own is set aside."""
        part = base_state.own_part(state_dict, self.param_groups)
        part = checkpoint.without_others(self, part)
        groups = part["param_groups"]
        named = base_state.by_id(groups, (p for g in self.param_groups for p in g["params"]))
        own = {f"{self.prefix}_{state.key}": state.key for state in self._declared.tensors}
        # torch would cast our fp32 tensors to the parameters' dtype: they do not go through it
        self._loaded, rest = checkpoint.split(part["state"], named, own)
        if sum(len(group["params"]) for group in groups) == self._size():  # or it is refused there
            checkpoint.validate(self, self._loaded, groups[0])
        self._loaded_groups = groups
        if base_state.KEY in state_dict and not isinstance(self.base, Wrapping):
            return {key: value for key, value in state_dict.items() if key != base_state.KEY}
        return base_state.with_part(state_dict, {**part, "state": rest})

    def _finish_load(self) -> None:
        """The wrapped optimizer has loaded its part: now the wrapper does."""
        self._own_state, self._loaded, self._resumed = self._loaded, {}, True
        mark = f"{self.prefix}_"
        # Each optimizer has its own way to load its groups: the wrapper's keys are set again
        for group, loaded in zip(self.param_groups, self._loaded_groups, strict=False):
            for key in [key for key in group if key.startswith(mark) and key not in loaded]:
                del group[key]
            group.update({k: copy.deepcopy(v) for k, v in loaded.items() if k.startswith(mark)})
        self._loaded_groups = ()
        for p, name, tensor in self._own_tensors():
            if self.state.get(p):  # an entry of ours alone would pass for the wrapped optimizer's
                self.state[p][name] = tensor
        self._clear()
        self._set_defaults()
        self._group = self.param_groups[0]
        for state in self._declared.objects:
            if (value := self._group.get(f"{self.prefix}_{state.key}")) is not None:
                state.write(self, value)

    def _set_defaults(self) -> None:
        """Give the first group what it lacks of the wrapper's settings and counters."""
        for name, value in self._given.items():
            self.param_groups[0].setdefault(f"{self.prefix}_{name}", copy.copy(value))

    def _owner(self) -> Tensor:
        """The parameter whose entry holds state that belongs to no parameter: the first that is
        trained, so that the wrapped optimizer has an entry for it, too."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return next((p for p in parameters if p.grad is not None), parameters[0])

    def _own_tensors(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        for name, tensors in self._own_state.items():
            for p, tensor in tensors.items():
                yield p, f"{self.prefix}_{name}", tensor
        if isinstance(self.base, Stateful):  # a term
            yield from self.base._own_tensors()
