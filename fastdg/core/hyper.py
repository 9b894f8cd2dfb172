"""Hyper-parameters that live in ``param_groups``, as those of every torch optimizer do."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Generic, TypedDict, TypeVar, overload

from torch import nn

T = TypeVar("T")


class Common(TypedDict, total=False):
    """Keywords that every wrapper takes, whatever its algorithm; see `DomainOptimizer`."""

    num_domains: int | None
    model: nn.Module | None
    check: bool


COMMON = inspect.signature(
    lambda *, num_domains=None, model=None, check=True: None  # `Common`, with its defaults
).parameters


def full_signature(init: Callable[..., Any]) -> inspect.Signature:
    """The signature of a wrapper's ``__init__``, without self and with `Common` written out."""
    own = list(inspect.signature(init).parameters.values())[1:]
    if own and own[-1].annotation == "Unpack[Common]":
        own[-1:] = COMMON.values()
    return inspect.Signature(own)


def check_keywords(kind: type, given: Iterable[str]) -> None:
    """Raise TypeError if the wrapper ``kind`` takes no keyword of one of these names."""
    parameters = inspect.signature(kind).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # of a class that somebody has derived, which knows
    known, name = list(parameters), kind.__name__
    for key in given:
        if key in known:
            continue
        if key == "params":
            raise TypeError(
                f"params: {name} has no such argument. To leave parameters out, freeze them "
                "(requires_grad_(False)) or give them to another optimizer"
            )
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
            raise TypeError(f"{key}: {name} has no such argument; did you mean {near[0]}=?")
        raise TypeError(
            f"{key}: {name} has no such argument; it takes {', '.join(known)}. It wraps an "
            f"optimizer, to which {key} may belong: "
            f"fastdg.{name}(torch.optim.Adam(model.parameters(), {key}=...))"
        )


class Setting(Generic[T]):
    """An attribute of a wrapper that is kept in ``param_groups[0]`` under the wrapper's prefix.

    So it is saved with every checkpoint, restored on load and open to schedulers. Where the group
    lacks it, the value given to the constructor holds.

    Args:
        check: raises unless ``(name, value)`` is a good value.
    """

    def __init__(self, check: Callable[[str, Any], None]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, opt: None, owner: type) -> Setting[T]: ...

    @overload
    def __get__(self, opt: Any, owner: type) -> T: ...

    def __get__(self, opt: Any, owner: type) -> Any:
        if opt is None:
            return self
        return opt.param_groups[0].get(f"{opt.prefix}_{self.name}", opt._given[self.name])

    def __set__(self, opt: Any, value: T) -> None:
        self.check(self.name, value)
        opt.param_groups[0][f"{opt.prefix}_{self.name}"] = value


def checked(owner: type, given: dict[str, Any]) -> dict[str, Any]:
    """``given``, if each is a good value of the `Setting` of that name."""
    for name, value in given.items():
        getattr(owner, name).check(name, value)
    return given


def check_weight(name: str, value: Any) -> None:
    if not (_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")


def check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")


def check_steps(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")


def check_decay(name: str, value: Any) -> None:
    if value is not None and not (_number(value) and 0 <= value < 1):
        raise ValueError(f"{name}: expected None or a decay in [0, 1), got {value!r}")


def check_reduction(name: str, value: Any) -> None:
    if value not in ("mean", "sum"):
        raise ValueError(f"{name}: expected 'mean' or 'sum', got {value!r}")


def check_absent(name: str, value: Any) -> None:
    if value not in ("auto", "zeros", "drop"):
        raise ValueError(f"{name}: expected 'auto', 'zeros' or 'drop', got {value!r}")


def check_share(name: str, value: Any) -> None:
    if not (_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")


def check_steepness(name: str, value: Any) -> None:
    if not (_number(value) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")


def check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
