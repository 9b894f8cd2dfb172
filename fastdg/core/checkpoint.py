"""Load a state: split it into the wrapper's part and the wrapped optimizer's.

Hooks of the wrapped optimizer tell its wrapper of loads and steps that bypass the wrapper.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._torch import optimizer_hooks
from ..dtypes import to_statistics_dtype
from ..warn import warn_user
from . import errors
from .base_optimizer import Wrapping
from .base_state import is_standard, own_part
from .declared_state import Group, PerRun, declared_state
from .nesting import chain, innermost

Kept = dict[str, dict[Tensor, Tensor]]


class HasState(Wrapping):
    """Interface of a wrapper with state; `Stateful` implements it."""

    _names: dict[Tensor, str]
    _own_state: Kept
    _loading = False
    _group: dict[str, Any]

    def _own_tensors(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        raise NotImplementedError

    def _remember(self) -> None:
        raise NotImplementedError

    def _split_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _finish_load(self) -> None:
        raise NotImplementedError


class CheckpointHooks:
    """Hooks of the wrapped optimizer: its wrapper loads states too, and refuses steps around it.

    The hooks refer to the wrapper weakly, so they do not keep it alive. A copy of them refers to
    none: a copied wrapper registers its own hooks on its own optimizer.
    """

    def __init__(self, wrapper: HasState | None = None) -> None:
        self.wrapper = weakref.ref(wrapper) if wrapper is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckpointHooks, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointHooks:
        return CheckpointHooks()

    def _idle(self) -> HasState | None:
        wrapper = self.wrapper() if self.wrapper is not None else None
        return None if wrapper is None or wrapper._loading else wrapper

    def on_save(self, base: Optimizer) -> None:
        wrapper = self.wrapper() if self.wrapper is not None else None
        if wrapper is not None:
            wrapper._remember()

    def before_load(self, base: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        wrapper = self._idle()
        if wrapper is None:
            return None
        state_dict = prepared(wrapper, state_dict)
        rest = wrapper._split_state(state_dict)
        check_complete(wrapper, state_dict, rest)
        return rest

    def after_load(self, base: Optimizer) -> None:
        wrapper = self._idle()
        if wrapper is not None:
            wrapper._finish_load()
            for hook in (optimizer_hooks(wrapper, "load_state_dict_post") or {}).values():
                hook(wrapper)

    def before_step(self, base: Optimizer, args: Any, kwargs: Any) -> None:
        wrapper = self._idle()
        if wrapper is not None and not wrapper._stepping and wrapper._grad_is_owned():
            raise errors.stepped_inside(type(wrapper).__name__, type(base).__name__)


def prepared(opt: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Apply the hooks that ``opt`` calls before it loads a state."""
    state_dict = dict(state_dict)
    for hook in (optimizer_hooks(opt, "load_state_dict_pre") or {}).values():
        changed = hook(opt, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict


def attach(wrapper: Any) -> None:
    """Register `CheckpointHooks` on ``wrapper.base``, for the lifetime of the wrapper."""
    hooks = CheckpointHooks(wrapper)
    for table, hook in (
        ("state_dict_pre", hooks.on_save),
        ("load_state_dict_pre", hooks.before_load),
        ("load_state_dict_post", hooks.after_load),
        ("step_pre", hooks.before_step),
    ):
        # An optimizer around another one may never call Optimizer.__init__: it has no tables
        if optimizer_hooks(wrapper.base, table) is not None:
            handle = getattr(wrapper.base, f"register_{table}_hook")(hook)
            weakref.finalize(wrapper, handle.remove).atexit = False


def split(
    state: Mapping[Any, dict[str, Any]], named: Mapping[Any, Tensor], own: Mapping[str, str]
) -> tuple[Kept, dict[Any, Any]]:
    """Split the entries of a state into the wrapper's tensors, copied, and all others.

    The tensors keep the dtype in which they were saved.

    Args:
        state: ``state`` of a state dict.
        named: id in it -> parameter.
        own: key of a wrapper's tensor in an entry -> name of the tensor.
    """
    kept: Kept = {name: {} for name in own.values()}
    rest: dict[Any, Any] = {}
    for i, entry in state.items():
        if i in named:
            p = named[i]
            for key in own.keys() & entry.keys():
                if isinstance(entry[key], Tensor):  # {} stands for a value that was not saved
                    kept[own[key]][p] = entry[key].detach().to(p.device, copy=True)
            entry = {key: value for key, value in entry.items() if key not in own}
        if entry:
            rest[i] = entry
    return kept, rest


def catch_up(wrapper: HasState) -> None:
    """Take over a state that was loaded into a wrapped optimizer which calls no hooks.

    Raises:
        ValueError: the state lacks tensors that the wrapper needs.
    """
    if wrapper._group is wrapper.param_groups[0]:
        return
    if isinstance(wrapper.base, HasState):
        catch_up(wrapper.base)
    saved = own_part(wrapper.base.state_dict(), wrapper.param_groups)
    pairs = zip(saved["param_groups"], wrapper.param_groups, strict=True)
    groups = [{**live, "params": group["params"]} for group, live in pairs]
    wrapper._split_state({"state": saved["state"], "param_groups": groups})
    wrapper._finish_load()


def check_complete(
    wrapper: HasState,
    state_dict: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> None:
    """Warn if ``state_dict`` lacks keys that the wrapped optimizer saves.

    Args:
        rest: part of it that the wrapped optimizer loads.

    Raises:
        ValueError: the optimizer cannot resume without them.
    """
    groups = own_part(state_dict, wrapper.param_groups)["param_groups"]
    if isinstance(wrapper.base, Wrapping) or not groups[0].get(f"{wrapper.prefix}_steps"):
        return
    now = wrapper.base.state_dict()
    lacking = [repr(key) for key in now if key not in state_dict]
    refused = bool(lacking) and not is_standard(now)
    others = tuple(f"{prefix}_" for prefix, _ in _prefixes(Wrapping))
    entries = now["state"].values() if is_standard(now) else ()
    if not rest.get("state") and any(
        not str(key).startswith(others) for entry in entries for key in entry
    ):
        lacking.append("the state of all parameters")
        refused = True
    message = (
        f"state_dict: it comes from a run but lacks {', '.join(lacking)}, which "
        f"{type(wrapper.base).__name__} saves and torch.distributed.checkpoint drops. Save "
        "opt.state_dict() with torch.save."
    )
    if refused:
        raise ValueError(message)
    if lacking:
        warn_user(message)


def validate(wrapper: HasState, kept: Kept, group: Group) -> None:
    """Check a state against the wrapper's declarations, before it changes anything.

    Args:
        kept: the wrapper's tensors in the state.
        group: first group of the state.

    Raises:
        ValueError: a run with steps lacks tensors; tensors have another shape or another number of
            domains; an object does not accept its saved state.
    """
    name, steps = type(wrapper).__name__, group.get(f"{wrapper.prefix}_steps", 0)
    for state in declared_state(type(wrapper)).tensors:
        needed = state.needed(wrapper, group)
        if not needed and isinstance(state, PerRun):
            continue
        key = f"{wrapper.prefix}_{state.key}"
        counted = state.rows
        rows = None if counted is None else counted.number(wrapper, group)
        if steps and needed and not kept[state.key] and rows != 0:
            raise ValueError(
                f"state_dict: it comes from a {name} run of {steps} steps but has no {key}, so the "
                f"{state.what} would silently start anew. torch.distributed.checkpoint loads only "
                f"into existing tensors: {state.way}."
            )
        for p, tensor in kept[state.key].items():
            if counted is not None and rows is not None and len(tensor) != rows:
                raise ValueError(
                    f"state_dict: {key} must have {rows} {counted.unit} ({counted.source}), got "
                    f"{len(tensor)}."
                )
            if not state.fits(p, tensor):
                own, each = tensor.shape, ""
                if counted is not None:
                    own, each = own[1:], f" for each of the {counted.unit}"
                raise ValueError(
                    f"state_dict: {key} of {wrapper._names[p]} must have the parameter's shape "
                    f"{tuple(p.shape)}, got {tuple(own)}{each}."
                )
    for item in declared_state(type(wrapper)).objects:
        item.check(wrapper, group)


def begin(wrapper: HasState, parameters: Iterable[Tensor]) -> None:
    """Create the wrapper's missing tensors of a new run for ``parameters``.

    torch.distributed.checkpoint loads into existing tensors, and makes a step with gradients of
    zeros to create them. The wrapped optimizer must have its own state for ``parameters``, or need
    none: it would take an entry with our tensors alone for its own.
    """
    there = set(parameters)
    for state in declared_state(type(wrapper)).tensors:
        kept, tensors = wrapper._own_state[state.key], state.begin(wrapper)
        for p in there & tensors.keys() - kept.keys():
            kept[p] = tensors[p]
    for p, key, tensor in wrapper._own_tensors():
        if p in there:
            wrapper.state[p][key] = tensor


def adopt(wrapper: HasState) -> None:
    """Take over existing state of an optimizer that was wrapped before or is created with state."""
    for p in wrapper._names:
        for name, kept in wrapper._own_state.items():
            if (tensor := wrapper.state.get(p, {}).get(f"{wrapper.prefix}_{name}")) is not None:
                kept[p] = to_statistics_dtype(tensor)
    begin(wrapper, [p for p in wrapper._names if p.requires_grad and wrapper.state.get(p)])


def without_others(wrapper: HasState, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Remove the state of wrappers that are not in this chain, with a warning.

    Raises:
        ValueError: another algorithm has saved the state.
    """
    for hook in (optimizer_hooks(wrapper, "load_state_dict_pre") or {}).values():
        hooks = getattr(hook, "__self__", None)
        if (
            isinstance(hooks, CheckpointHooks)
            and hooks.wrapper is not None
            and hooks.wrapper() is not None
        ):
            return state_dict  # the wrapper outside has removed it
    links = list(chain(wrapper))
    here = {link.prefix for link in links}
    groups, known = state_dict["param_groups"], dict(_prefixes(Wrapping))
    away = {x: known[x] for x in known.keys() - here if f"{x}_steps" in groups[0]}
    if not away:
        return state_dict
    names = " and ".join(sorted(kind.__name__ for kind in away.values()))
    own = [link for link in links if link.role == "algorithm"] or links
    if any(kind.role == "algorithm" for kind in away.values()) and not any(
        f"{link.prefix}_steps" in groups[0] for link in own
    ):
        name, inner = type(own[0]).__name__, type(innermost(wrapper)).__name__
        raise ValueError(
            f"state_dict: {names} saved it, so {name} can load only the part of the {inner}. For "
            f"this part alone, load it into the {inner} before you wrap it. To resume the run, "
            f"wrap the {inner} in {names}."
        )
    warn_user(
        f"state_dict: ignored the state of {names}, which does not wrap this optimizer.",
    )
    marks = tuple(f"{prefix}_" for prefix in away)

    def rest(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if not str(key).startswith(marks)}

    state = {i: rest(entry) for i, entry in state_dict["state"].items()}
    return {
        **state_dict,
        "state": {i: entry for i, entry in state.items() if entry},
        "param_groups": [rest(group) for group in groups],
    }


def _prefixes(kind: type[Wrapping]) -> Iterator[tuple[str, type[Wrapping]]]:
    """Yield the prefix of every wrapper class; a base class comes after its subclasses."""
    for sub in kind.__subclasses__():
        yield from _prefixes(sub)
    if hasattr(kind, "prefix"):
        yield kind.prefix, kind
