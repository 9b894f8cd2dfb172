"""A wrapper's own state, saved within the wrapped optimizer's."""

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
from .hyper import argument, fixed
from .nesting import chain


# For type checkers, the arguments that a wrapper declares are the fields of a dataclass
@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(argument, fixed))
class Stateful(checkpoint.HasState):
    """Keeps tensors beside the wrapped optimizer's, and settings and counters in its first group.

    Copies and loads keep the dtype of own tensors, whatever the dtype of the parameter.
    """

    _loaded_groups: Sequence[dict[str, Any]] = ()
    _given: dict[str, Any]  # defaults for keys that the first group of a loaded state lacks

    def _clear(self) -> None:
        """Drop staged micro-batches, statistics and caches of the run."""

    @property
    def _declared(self) -> DeclaredState:
        return declared_state(type(self))

    def _known_domains(self) -> int:
        """Return the number of domains in own state."""
        kept = [self._own_state[x.key] for x in self._declared.tensors if x.rows is DOMAINS]
        return max([x.shape[0] for tensors in kept for x in tensors.values()], default=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's ``state_dict()`` with the wrapper's state in it.

        If its layout is not PyTorch's, the wrapper's state is under ``"fastdg"``.

        Raises:
            RuntimeError: torch.distributed.checkpoint is the caller, and would lose a part of the
                state.
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
        """Copy the states of objects to ``param_groups``, before a save."""
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
        """Load a state of this wrapper, or of the bare wrapped optimizer.

        With a bare optimizer's state, the wrapper's own state starts anew with the constructor's
        settings. ``opt.base.load_state_dict`` does the same.

        Raises:
            ValueError: the state has another number of domains, or lacks tensors that it needs.
                Nothing is changed then.
        """
        state_dict = checkpoint.prepared(self, state_dict)
        rest = self._split_state(state_dict)
        checkpoint.check_complete(self, state_dict, rest)
        self._loading = True  # so that `checkpoint.CheckpointHooks` do not load it again
        try:
            self.base.load_state_dict(rest)
        finally:
            self._loading = False
        self._finish_load()
        for post_hook in (optimizer_hooks(self, "load_state_dict_post") or {}).values():
            post_hook(self)

    def _split_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Set the wrapper's own state aside, and return the part for the wrapped optimizer."""
        part = base_state.own_part(state_dict, self.param_groups)
        part = checkpoint.without_others(self, part)
        groups = part["param_groups"]
        named = base_state.by_id(groups, (p for g in self.param_groups for p in g["params"]))
        own = {f"{self.prefix}_{state.key}": state.key for state in self._declared.tensors}
        # torch would cast our fp32 tensors to the parameters' dtype, so it does not load them
        self._loaded, rest = checkpoint.split(part["state"], named, own)
        if sum(len(group["params"]) for group in groups) == self._size():  # else torch raises
            checkpoint.validate(self, self._loaded, groups[0])
        self._loaded_groups = groups
        if base_state.KEY in state_dict and not isinstance(self.base, Wrapping):
            return {key: value for key, value in state_dict.items() if key != base_state.KEY}
        return base_state.with_part(state_dict, {**part, "state": rest})

    def _finish_load(self) -> None:
        """Load the wrapper's own part, after the wrapped optimizer has loaded its part."""
        self._own_state, self._loaded, self._resumed = self._loaded, {}, True
        mark = f"{self.prefix}_"
        # Optimizers may load groups in their own way, so the wrapper's keys are set again
        for group, loaded in zip(self.param_groups, self._loaded_groups, strict=False):
            for key in [key for key in group if key.startswith(mark) and key not in loaded]:
                del group[key]
            group.update({k: copy.deepcopy(v) for k, v in loaded.items() if k.startswith(mark)})
        self._loaded_groups = ()
        for p, name, tensor in self._own_tensors():
            if self.state.get(p):  # the optimizer would take an entry of ours alone for its own
                self.state[p][name] = tensor
        self._clear()
        self._set_defaults()
        self._group = self.param_groups[0]
        for state in self._declared.objects:
            if (value := self._group.get(f"{self.prefix}_{state.key}")) is not None:
                state.write(self, value)

    def _set_defaults(self) -> None:
        """Add missing settings and counters of the wrapper to the first group."""
        for name, value in self._given.items():
            self.param_groups[0].setdefault(f"{self.prefix}_{name}", copy.copy(value))

    def _owner(self) -> Tensor:
        """Return the parameter whose entry holds state of the whole run.

        It is the first with a gradient, since the wrapped optimizer has an entry for it too.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        return next((p for p in parameters if p.grad is not None), parameters[0])

    def _own_tensors(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        for name, tensors in self._own_state.items():
            key = f"{self.prefix}_{name}"
            for p, tensor in tensors.items():
                yield p, key, tensor
        if isinstance(self.base, Stateful):  # a term
            yield from self.base._own_tensors()
