"""Arguments of a wrapper: declared in one line, checked, shown, and saved if they are settings.

    class Penalty(DomainOptimizer):
        penalty_weight: float = hyper(1.0, check_weight)

declares a keyword of the constructor with a default and a check, an entry of ``param_groups[0]``
that checkpoints save and schedulers change, an attribute, and a part of ``repr``.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import nn

Check = Callable[[str, Any], Any]
NEEDED = inspect.Parameter.empty  # an argument without a default


def itself(value: Any) -> Any:
    return value


def type_name(value: Any) -> str:
    return type(value).__name__


class Option:
    """An argument of the constructor that is an attribute of the wrapper.

    Args:
        default: value if none is given; `NEEDED`: the argument is required.
        check: called with name and value; raises for an invalid value.
        convert: given value -> value of the attribute.
        positional: whether it may be passed by position, after ``base``.
        show: value -> value in ``repr``; None: ``repr`` omits it.
        fill: wrapper -> value in place of a given None.
    """

    def __init__(
        self,
        default: Any,
        check: Check | None = None,
        convert: Callable[[Any], Any] | None = None,
        positional: bool = False,
        show: Callable[[Any], Any] | None = itself,
        fill: Callable[[Any], Any] | None = None,
    ) -> None:
        self.default, self.convert, self.positional = default, convert, positional
        self.show, self.fill = show, fill
        self.check = check or _anything

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.annotation = name, owner.__annotations__.get(name, Any)

    def __get__(self, opt: Any, owner: type) -> Any:
        if opt is None:
            return self
        try:
            return opt.__dict__[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, opt: Any, value: Any) -> None:
        self.check(self.name, value)
        opt.__dict__[self.name] = value if self.convert is None else self.convert(value)

    def parameter(self) -> inspect.Parameter:
        """Return the parameter for a signature."""
        by_place, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        kind = by_place if self.positional else by_name
        return inspect.Parameter(self.name, kind, default=self.default, annotation=self.annotation)


class NotKept(Option):
    """An argument for the constructor alone, without an attribute."""

    def __init__(self, default: Any, check: Check) -> None:
        super().__init__(default, check, show=None)


class Hyper(Option):
    """A hyper-parameter: an `Option` in ``param_groups[0]`` under the wrapper's prefix.

    Checkpoints save and restore it, and schedulers can change it. If the group lacks it, the
    constructor's value holds.
    """

    def __get__(self, opt: Any, owner: type) -> Any:
        if opt is None:
            return self
        group = opt.base.param_groups[0]  # the wrapper's own
        return group.get(f"{opt.prefix}_{self.name}", opt._given[self.name])

    def __set__(self, opt: Any, value: Any) -> None:
        self.check(self.name, value)
        opt.param_groups[0][f"{opt.prefix}_{self.name}"] = value


# The return type is Any, so that `weight: float = hyper(1.0, check_weight)` type-checks as in a
# dataclass; type checkers treat `DomainOptimizer` as one.
def hyper(default: Any, check: Check, *, fill: Callable[[Any], Any] | None = None) -> Any:
    """Declare a hyper-parameter, see `Hyper`."""
    return Hyper(default, check, fill=fill)


def option(
    default: Any,
    check: Check | None = None,
    convert: Callable[[Any], Any] | None = None,
    *,
    show: Callable[[Any], Any] | None = itself,
) -> Any:
    """Declare an argument other than a hyper-parameter, see `Option`."""
    return Option(default, check, convert, show=show)


def argument(
    check: Check | None = None,
    *,
    default: Any = NEEDED,
    convert: Callable[[Any], Any] | None = None,
    kw_only: bool,
    show: Callable[[Any], Any] | None = itself,
) -> Any:
    """Declare an argument without a default, or a positional one, see `Option`.

    Type checkers read ``kw_only`` too.
    """
    return Option(default, check, convert, not kw_only, show)


def fixed(value: Any, *, init: bool) -> Any:
    """Return ``value``: a plain attribute, in place of an argument that a base declares.

    Without the ``init=False`` type checkers take it for an argument.
    """
    return value


def declared(kind: type) -> dict[str, Option]:
    """Return the arguments that a class declares: its own in order, then its bases'.

    A plain attribute of the same name removes an argument.
    """
    found: dict[str, Option | None] = {}
    for base in kind.__mro__:
        for name, value in vars(base).items():
            found.setdefault(name, value if isinstance(value, Option) else None)
    return {name: value for name, value in found.items() if value is not None}


def own_signature(init: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of an ``__init__``, without self."""
    return inspect.Signature(list(inspect.signature(init).parameters.values())[1:])


def declared_signature(kind: type) -> inspect.Signature:
    """Return the signature of a wrapper's constructor: ``base`` and the declared arguments."""
    base = inspect.Parameter(
        "base", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Optimizer"
    )
    options = declared(kind).values()
    first = [o.parameter() for o in options if o.positional]
    keywords = [o.parameter() for o in options if not o.positional]
    return inspect.Signature([base, *first, *keywords])


def check_keywords(kind: type, given: Iterable[str]) -> None:
    """Raise TypeError unless the wrapper ``kind`` has all these keywords."""
    parameters = inspect.signature(kind).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # a derived class with its own __init__ checks them itself
    known, name = list(parameters), kind.__name__
    for key in given:
        if key in known:
            continue
        if key == "params":
            raise TypeError(
                f"params: {name} has no such argument. To exclude parameters, freeze them "
                "(requires_grad_(False)) or pass them to another optimizer."
            )
        if hasattr(kind, key) and not kind.__module__.startswith("fastdg."):
            raise TypeError(
                f"{key}: {name} does not declare it as an argument. Write "
                f"{key}: ... = hyper(default, check) in the class, from fastdg.core.hyper."
            )
        if near := nearest(key, known):
            raise TypeError(f"{key}: {name} has no such argument. Did you mean {near}=?")
        near = ending(key, known)
        advice = f"Did you mean {near}=?" if near else f"Its arguments are {', '.join(known)}."
        raise TypeError(
            f"{key}: {name} has no such argument. {advice} An "
            f"argument of the wrapped optimizer belongs there: "
            f"fastdg.{name}(torch.optim.Adam(model.parameters(), {key}=...))."
        )


def ending(key: str, known: Iterable[str]) -> str | None:
    """Return the one name among ``known`` that ends in ``_key``: penalty_weight for weight."""
    names = [name for name in known if name.endswith(f"_{key}") and not name.startswith("pre_")]
    return names[0] if len(names) == 1 else None


def nearest(key: str, known: Iterable[str]) -> str | None:
    """Return the name among ``known`` that is most like ``key``, if one is like it."""
    known = list(known)
    # Short names belong to the optimizer: lr
    longer = [name for name in known if len(key) > 3 and name.startswith(f"{key}_")]
    near = longer or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return near[0] if near else None


def bound(kind: type, places: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Bind the arguments of a constructor to their names, with defaults, and check them.

    Raises:
        TypeError: there are too many, or one is missing, given twice, or not declared.
        ValueError: a value is invalid.
    """
    options = declared(kind)
    order = [name for name, o in options.items() if o.positional]
    if len(places) > len(order):
        raise TypeError(
            f"{kind.__name__}: takes {1 + len(order)} positional argument(s), got "
            f"{1 + len(places)}. Pass the others by name."
        )
    for name, value in zip(order, places, strict=False):
        if name in given:
            raise TypeError(f"{name}: {kind.__name__} got it by position and by name. Pass one.")
        given = {**given, name: value}
    for name in given.keys() - options.keys():
        raise TypeError(f"{name}: {kind.__name__} declares no such argument.")
    values = {}
    for name, o in options.items():
        value = given.get(name, o.default)
        if value is NEEDED:
            raise TypeError(f"{name}: {kind.__name__} needs it, got none. Pass {name}=.")
        if value is not None or o.fill is None:
            o.check(name, value)
        values[name] = value
    return values


def check_weight(name: str, value: Any) -> None:
    if not (_number(value) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}.")


def check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value!r}.")


def check_steps(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}.")


def check_decay(name: str, value: Any) -> None:
    if value is not None and not (_number(value) and 0 <= value < 1):
        raise ValueError(f"{name}: expected None or a decay in [0, 1), got {value!r}.")


def optional(check: Check) -> Check:
    """Return a check that a value is None or passes ``check``."""

    def check_unless_none(name: str, value: Any) -> None:
        if value is not None:
            check(name, value)

    return check_unless_none


def check_one_of(*values: str) -> Check:
    """Return a check that a value is one of ``values``."""
    *others, last = map(repr, values)
    expected = f"{', '.join(others)} or {last}"

    def check(name: str, value: Any) -> None:
        if value not in values:
            raise ValueError(f"{name}: expected {expected}, got {value!r}.")

    return check


check_reduction = check_one_of("mean", "sum")
check_absent = check_one_of("auto", "zeros", "drop")


def check_share(name: str, value: Any) -> None:
    if not (_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}.")


def check_part(name: str, value: Any) -> None:
    if not (_number(value) and 0 <= value < 1):
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}.")


def check_inside(name: str, value: Any) -> None:
    if not (_number(value) and 0 < value < 1):
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}.")


def check_steepness(name: str, value: Any) -> None:
    if not (_number(value) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}.")


def check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}.")


def check_module(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(value).__name__}.")


check_rate, check_norm = optional(check_weight), optional(check_steepness)
check_extent, check_model = optional(check_steps), optional(check_module)


def check_generator(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name}: expected a torch.Generator or None, got {type(value).__name__}.")


def _anything(name: str, value: Any) -> None:
    """Accept any value: the conversion checks it."""


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
