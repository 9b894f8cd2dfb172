"""State of the wrapped optimizer: saved, copied and renewed, whatever kind of optimizer it is."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..warn import warn_user

# Where the wrappers' own part lies if the optimizer's state dict is not laid out as PyTorch's are
KEY = "fastdg"
_STANDARD = ("state", "param_groups")
_DCP = "torch.distributed.checkpoint.state_dict"


def by_id(groups: Sequence[Mapping[str, Any]], parameters: Iterable[Tensor]) -> dict[Any, Tensor]:
    """Id in a state dict's ``groups`` -> parameter.

    Ids may be names (torch.distributed.checkpoint): the order of the groups says which is who.
    """
    ids = [i for group in groups for i in group["params"]]
    return dict(zip(ids, parameters, strict=False))


def is_standard(state_dict: Mapping[str, Any]) -> bool:
    """Whether ``state_dict`` has an entry for each parameter, and groups, as PyTorch's have."""
    groups = state_dict.get("param_groups")
    return (
        isinstance(state_dict.get("state"), Mapping)
        and isinstance(groups, Sequence)
        and all(isinstance(group, Mapping) and "params" in group for group in groups)
    )


def own_part(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The part of ``state_dict`` that holds what wrappers keep, laid out as PyTorch lays it out.

    Args:
        state_dict: of a wrapper, or of a bare optimizer, which has no such part.
        groups: the optimizer's, as they are now.
    """
    if KEY in state_dict:
        return dict(state_dict[KEY])
    if is_standard(state_dict):
        return dict(state_dict)
    ids = iter(range(sum(len(group["params"]) for group in groups)))
    return {
        "state": {},
        "param_groups": [{"params": [next(ids) for _ in g["params"]]} for g in groups],
    }


def with_part(state_dict: Mapping[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """``state_dict`` with another part in place of its `own_part`."""
    if KEY not in state_dict and is_standard(state_dict):
        return {**state_dict, **part}
    return {**state_dict, KEY: part}


def with_own(
    saved: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    own: Sequence[tuple[Tensor, str, Tensor]],
    prefixes: tuple[str, ...],
    name: str,
) -> dict[str, Any]:
    """A base's state dict with what its wrappers keep.

    Args:
        saved: what the base's ``state_dict()`` gives.
        groups: the optimizer's, as they are now.
        own: parameter, key and tensor of what the wrappers keep for each parameter.
        prefixes: of the wrappers' keys in the groups.
        name: of the base, for the error.

    Raises:
        RuntimeError: torch.distributed.checkpoint asks, which would lose a part of it.
    """
    part = own_part(saved, groups)
    parameters = by_id(part["param_groups"], (p for group in groups for p in group["params"]))
    _check_caller(saved, parameters.keys(), name)
    if own:
        # Who has entries for some parameters must have them for all: torch.distributed.checkpoint
        state = {**part["state"], **{i: dict(part["state"].get(i, {})) for i in parameters}}
        ids = {p: i for i, p in parameters.items()}
        for p, key, tensor in own:
            state[ids[p]][key] = tensor
        part["state"] = state
    if KEY in saved or not is_standard(saved):
        part["param_groups"] = [
            {**group, **{k: v for k, v in live.items() if k.startswith(prefixes)}}
            for group, live in zip(part["param_groups"], groups, strict=True)
        ]
    return with_part(saved, part)


def _check_caller(saved: Mapping[str, Any], ids: Iterable[Any], name: str) -> None:
    lost = [repr(key) for key in saved if key not in _STANDARD]
    lost += [f"state[{key!r}]" for key in set(saved.get("state", ())) - set(ids)]
    if not lost:
        return
    frame = sys._getframe(1)
    package = __name__.partition(".")[0] + "."
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        frame = frame.f_back
    if frame.f_globals.get("__name__") == _DCP:
        raise RuntimeError(
            f"state_dict: torch.distributed.checkpoint keeps each parameter's state and the groups "
            f"alone, and {name} also saves {', '.join(sorted(lost))}. Save opt.state_dict() with "
            "torch.save."
        )


# -- optimizers inside optimizers --


def is_new(base: Optimizer) -> bool:
    """Whether it has no state yet, wherever it keeps it: an optimizer around another one may have
    none in ``state`` itself, and is asked for a probing step again and again."""
    saved = base.state_dict()
    return is_standard(saved) and not any(saved["state"].values())


def nested(base: Optimizer) -> dict[str, Optimizer]:
    """The optimizers that this one holds, by the attributes that hold them."""
    return {name: x for name, x in vars(base).items() if isinstance(x, Optimizer)}


class Portable:
    """Stands for an optimizer in a pickle or a deep copy, and is that optimizer afterwards.

    Optimizers inherit from PyTorch a way to be copied that keeps groups, state and defaults alone:
    whatever else they have, such as the optimizer inside a Lookahead, would be lost.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    def __reduce__(self) -> tuple[Any, ...]:
        base = self.base
        kept = {name: carried(vars(base)[name]) for name in _carried_names(base)}
        ids = {id(p) for group in base.param_groups for p in group["params"]}
        # Copied parameters have other ids; loading a state finds out which is which
        tables = [x for x in kept.values() if isinstance(x, dict)]
        loads = any(isinstance(key, int) and key in ids for table in tables for key in table)
        return _rebuilt, (type(base), kept, base.state_dict() if loads else None)


def carried(x: Any) -> Any:
    """``x`` as it goes into a pickle or a deep copy."""
    if not isinstance(x, Optimizer):
        return x
    kind = type(x)
    own_way = kind.__getstate__ is not Optimizer.__getstate__
    if own_way and kind.__setstate__ is not Optimizer.__setstate__:
        return x
    if kind.__module__.startswith("torch.optim."):  # makes again what is not copied
        return x
    return Portable(x) if _carried_names(x) - x.__getstate__().keys() else x


def _carried_names(base: Optimizer) -> set[str]:
    """Attributes that belong to the optimizer; the others are hooks, or patched by schedulers."""
    patched = {"step", "_opt_called", "_zero_grad_profile_name"}
    return {name for name in vars(base) if "hook" not in name} - patched


def _rebuilt(
    kind: type[Optimizer], kept: dict[str, Any], state_dict: dict[str, Any] | None
) -> Optimizer:
    base = kind.__new__(kind)
    vars(base).update(kept)
    Optimizer.__setstate__(base, {})  # every hook table torch knows
    if state_dict is not None:
        base.load_state_dict(state_dict)
    return base


# -- starting anew --


def renew(base: Optimizer, prefixes: tuple[str, ...]) -> None:
    """Start ``base`` anew in place: hyper-parameters stay, and all else is a new optimizer's.

    Args:
        base: the innermost wrapped optimizer; those inside it start anew too.
        prefixes: of keys in the groups that are not the optimizer's.
    """
    try:
        fresh: Optimizer | None = _made_anew(base)
    except Exception as error:  # made in some other way, as its users alone know
        warn_user(
            f"reset_base: cannot make a new {type(base).__name__} "
            f"({type(error).__name__}: {error}), so the state of this one is cleared, "
            "and its counters go on. Pass reset_base=False, or start it anew yourself.",
        )
        fresh = None
    _take_over(base, fresh, prefixes)


def _accepted(base: Optimizer) -> set[str]:
    """Names of the arguments that optimizers of this kind are made with."""
    inner = (name for held in nested(base).values() for name in _accepted(held))
    return set(inspect.signature(type(base)).parameters) | set(inner)


def _made_anew(base: Optimizer) -> Any:
    _, *rest = inspect.signature(type(base)).parameters
    known = {**base.defaults, **vars(base)}
    settings = {name: known[name] for name in rest if name in known}
    held = next(iter(nested(base).values()), None)
    if held is not None:
        return type(base)(_made_anew(held), **settings)
    kept = {"params", "param_names", *rest}
    groups = [{k: v for k, v in group.items() if k in kept} for group in base.param_groups]
    return type(base)(groups, **settings)


def _take_over(base: Optimizer, fresh: Optimizer | None, prefixes: tuple[str, ...]) -> None:
    """Make ``base`` what ``fresh`` is, but for its settings."""
    base.state.clear()  # in place: schedulers and checkpoints hold it
    if fresh is not None:
        base.state.update(fresh.state)
        # A scheduler's learning rate stays, and a mode, in which the weights are; counters do not
        settings = _accepted(base) | {"params", "param_names"}
        for group, new in zip(base.param_groups, fresh.param_groups, strict=True):
            for key in new.keys() - settings:
                if not (isinstance(new[key], bool) or key.startswith(prefixes)):
                    group[key] = new[key]
            for key in (group.keys() & _written(base)) - new.keys() - settings:
                if not key.startswith(prefixes):  # counted from the first step on
                    del group[key]
        for name, value in vars(fresh).items():
            counts = isinstance(value, (int, dict)) and not isinstance(value, bool)
            if counts and name not in settings | {"state", "defaults"} and "hook" not in name:
                setattr(base, name, value)
    for name, held in nested(base).items():
        _take_over(held, None if fresh is None else nested(fresh).get(name), prefixes)


def _written(base: Optimizer) -> set[str]:
    """The keys of groups that code of this kind of optimizer names."""
    codes = [
        inspect.unwrap(f).__code__
        for kind in type(base).__mro__
        if not issubclass(Optimizer, kind)
        for f in vars(kind).values()
        if inspect.isfunction(f)
    ]
    names = {x for code in codes for x in code.co_consts if isinstance(x, str)}
    return names.union(*(_written(held) for held in nested(base).values()))


def forwarded(base: Optimizer, name: str) -> Any:
    """A public method of the optimizer, which its wrapper has not.

    Attributes stay with the optimizer: frameworks look at some (``_step_supports_amp_scaling``)
    to find out what they may do, and would do it behind the wrapper's back.

    Raises:
        AttributeError: there is no such method.
    """
    if not name.startswith("_"):
        found = getattr(base, name, None)
        if inspect.ismethod(found):
            return found
    raise AttributeError(name)
