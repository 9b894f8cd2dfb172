"""Hyper-parameters that live in ``param_groups``, as those of every torch optimizer do."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


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
