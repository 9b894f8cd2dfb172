"""Save, copy and renew the state of any kind of wrapped optimizer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..warn import warn_user

# Key of the wrappers' part if the optimizer's state dict has another layout than PyTorch's
KEY = "fastdg"
_STANDARD = ("state", "param_groups")
_DCP = "torch.distributed.checkpoint.state_dict"


def by_id(groups: Sequence[Mapping[str, Any]], parameters: Iterable[Tensor]) -> dict[Any, Tensor]:
    """Map each id in a state dict's ``groups`` to its parameter.

    Ids may be names (torch.distributed.checkpoint), so parameters are matched by their order.
    """
    ids = [i for group in groups for i in group["params"]]
    return dict(zip(ids, parameters, strict=False))


def is_standard(state_dict: Mapping[str, Any]) -> bool:
    """Return whether ``state_dict`` has PyTorch's layout: entries by parameter, and groups."""
    groups = state_dict.get("param_groups")
    return (
        isinstance(state_dict.get("state"), Mapping)
        and isinstance(groups, Sequence)
        and all(isinstance(group, Mapping) and "params" in group for group in groups)
    )


def own_part(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the part of ``state_dict`` with the wrappers' state, in PyTorch's layout.

    Args:
        state_dict: state of a wrapper, or of a bare optimizer, which has no such part.
        groups: current groups of the optimizer.
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
    """Replace the `own_part` of ``state_dict``."""
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
    """Add the wrappers' state to a base's state dict.

    Args:
        saved: result of the base's ``state_dict()``.
        groups: current groups of the optimizer.
        own: parameter, key and tensor of each of the wrappers' tensors.
        prefixes: prefixes of the wrappers' keys in the groups.
        name: name of the base, for the error.

    Raises:
        RuntimeError: torch.distributed.checkpoint is the caller, and would lose a part of the
            state.
    """
    part = own_part(saved, groups)
    parameters = by_id(part["param_groups"], (p for group in groups for p in group["params"]))
    _check_caller(saved, parameters.keys(), name)
    if own:
        # torch.distributed.checkpoint expects entries for all parameters or for none
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
            f"state_dict: torch.distributed.checkpoint saves only each parameter's state and the "
            f"groups, but {name} also saves {', '.join(sorted(lost))}. Save opt.state_dict() with "
            "torch.save."
        )


# -- optimizers inside optimizers --


def is_new(base: Optimizer) -> bool:
    """Return whether ``base`` has no state yet.

    An optimizer around another one may have none in its own ``state``, so its state dict decides.
    """
    saved = base.state_dict()
    return is_standard(saved) and not any(saved["state"].values())


def nested(base: Optimizer) -> dict[str, Optimizer]:
    """Return the optimizers inside ``base``: attribute -> optimizer."""
    return {name: x for name, x in vars(base).items() if isinstance(x, Optimizer)}


class Portable:
    """Replaces an optimizer in a pickle or a deep copy, and becomes this optimizer again.

    PyTorch copies only the groups, state and defaults of an optimizer: all other attributes, such
    as the optimizer inside a Lookahead, would be lost.
    """

    def __init__(self, base: Optimizer) -> None:
        self.base = base

    def __reduce__(self) -> tuple[Any, ...]:
        base = self.base
        kept = {name: carried(vars(base)[name]) for name in _carried_names(base)}
        ids = {id(p) for group in base.param_groups for p in group["params"]}
        # Copied parameters have other ids; load_state_dict maps them
        tables = [x for x in kept.values() if isinstance(x, dict)]
        loads = any(isinstance(key, int) and key in ids for table in tables for key in table)
        return _rebuilt, (type(base), kept, base.state_dict() if loads else None)


def carried(x: Any) -> Any:
    """Return ``x``, or a `Portable` in its place, for a pickle or a deep copy."""
    if not isinstance(x, Optimizer):
        return x
    kind = type(x)
    own_way = kind.__getstate__ is not Optimizer.__getstate__
    if own_way and kind.__setstate__ is not Optimizer.__setstate__:
        return x
    # Those of torch recreate the entries that PyTorch does not copy
    if kind.__module__.startswith("torch.optim."):
        return x
    return Portable(x) if _carried_names(x) - x.__getstate__().keys() else x


def _carried_names(base: Optimizer) -> set[str]:
    """Return attributes of the optimizer itself, without hooks and schedulers' patches."""
    patched = {"step", "_opt_called", "_zero_grad_profile_name"}
    return {name for name in vars(base) if "hook" not in name} - patched


def _rebuilt(
    kind: type[Optimizer], kept: dict[str, Any], state_dict: dict[str, Any] | None
) -> Optimizer:
    base = kind.__new__(kind)
    vars(base).update(kept)
    Optimizer.__setstate__(base, {})  # creates all hook tables
    if state_dict is not None:
        base.load_state_dict(state_dict)
    return base


# -- starting anew --


def renew(base: Optimizer, prefixes: tuple[str, ...]) -> None:
    """Reset ``base`` in place to a new optimizer with its hyper-parameters.

    Args:
        base: innermost wrapped optimizer; optimizers inside it are reset too.
        prefixes: prefixes of the wrappers' keys in the groups.
    """
    try:
        fresh: Optimizer | None = _made_anew(base)
    except Exception as error:  # its constructor needs arguments that it does not keep
        warn_user(
            f"reset_base: cannot create a new {type(base).__name__} "
            f"({type(error).__name__}: {error}). Its state is cleared, but its counters go on. "
            "Pass reset_base=False, or reset it yourself.",
        )
        fresh = None
    _take_over(base, fresh, prefixes)


def _accepted(base: Optimizer) -> set[str]:
    """Return the names of the constructor's arguments, of optimizers inside too."""
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
    """Copy the state and counters of ``fresh`` to ``base``; settings stay."""
    base.state.clear()  # in place: schedulers and checkpoints refer to it
    if fresh is not None:
        base.state.update(fresh.state)
        # A scheduler's learning rate and a mode that describes the weights stay; counters do not
        settings = _accepted(base) | {"params", "param_names"}
        for group, new in zip(base.param_groups, fresh.param_groups, strict=True):
            for key in new.keys() - settings:
                if not (isinstance(new[key], bool) or key.startswith(prefixes)):
                    group[key] = new[key]
            for key in (group.keys() & _written(base)) - new.keys() - settings:
                if not key.startswith(prefixes):  # a counter that the first step creates
                    del group[key]
        for name, value in vars(fresh).items():
            counts = isinstance(value, (int, dict)) and not isinstance(value, bool)
            if counts and name not in settings | {"state", "defaults"} and "hook" not in name:
                setattr(base, name, value)
    for name, held in nested(base).items():
        _take_over(held, None if fresh is None else nested(fresh).get(name), prefixes)


def _written(base: Optimizer) -> set[str]:
    """Return all strings in the code of this kind of optimizer: keys of groups are among them."""
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
    """Return a public method of the optimizer that its wrapper lacks.

    Attributes are not forwarded: frameworks read some (``_step_supports_amp_scaling``) to decide
    how to treat an optimizer, and would bypass the wrapper.

    Raises:
        AttributeError: there is no such method.
    """
    if not name.startswith("_"):
        found = getattr(base, name, None)
        if inspect.ismethod(found):
            return found
    raise AttributeError(name)
