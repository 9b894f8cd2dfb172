"""State of an algorithm: declared in a line; saved, loaded, checked and begun by the machinery.

    class Momentum(DomainOptimizer):
        trace = PerParameter("trace", "trace")
        position = RunValue(0)

`PerParameter` and `PerRun` are tensors in the entries of a state dict's ``state``; `RunValue` and
`ObjectState` are in its first group. All keys begin with the wrapper's prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar, overload

from torch import Tensor

T = TypeVar("T")
Group = Mapping[str, Any]  # the first of a state dict
STEP_FIRST = "run one backward and step before loading"


class Rows(NamedTuple):
    """The meaning of the first dimension of a tensor, and its size.

    Attributes:
        unit: plural of the thing that has a row each.
        source: name of the place that gives their number, for messages.
        number: wrapper, first group of a state -> how many there have to be; None: any number.
    """

    unit: str
    source: str
    number: Callable[[Any, Group], int | None]


DOMAINS = Rows("domains", "num_domains", lambda opt, group: opt.num_domains)


class PerParameter:
    """Tensors of a wrapper: ``opt.<name>`` is a dict, parameter -> tensor of its shape.

    Args:
        key: in the state dict, after the prefix.
        what: name of the tensors in messages.
        rows: meaning of a dimension before the parameter's own; None: there is none.
        begin: wrapper -> the tensors of a new run, where they are known before any forward:
            torch.distributed.checkpoint loads into tensors that exist.
        needed: wrapper, first group of a state -> whether a run goes on with them. If not, a state
            may lack them, and nothing is checked.
        way: how a user makes them exist before a load, for messages.
    """

    def __init__(
        self,
        key: str,
        what: str,
        *,
        rows: Rows | None = None,
        begin: Callable[[Any], Any] | None = None,
        needed: Callable[[Any, Group], object] = lambda opt, group: True,
        way: str = STEP_FIRST,
    ) -> None:
        self.key, self.what, self.rows, self.needed, self.way = key, what, rows, needed, way
        self._begin = begin

    def begin(self, opt: Any) -> dict[Tensor, Tensor]:
        """The tensors of a new run; empty: not known yet."""
        return {} if self._begin is None else self._begin(opt)

    def __get__(self, opt: Any, owner: type) -> Any:
        return self if opt is None else opt._own_state[self.key]

    def __set__(self, opt: Any, value: Any) -> None:
        tensors = dict(value)  # it may be the dict itself
        opt._own_state[self.key].clear()
        opt._own_state[self.key].update(tensors)

    def fits(self, p: Tensor, tensor: Tensor) -> bool:
        """Whether it has the parameter's shape; one without a size yet gets it by loading."""
        shape = tensor.shape if self.rows is None else tensor.shape[1:]
        return shape == p.shape or not p.numel()


class PerRun(PerParameter):
    """One tensor of a wrapper, in the entry of a parameter that is trained: ``opt.<name>`` is the
    tensor, or None before there is one. Arguments as of `PerParameter`; ``begin`` gives the tensor,
    or None."""

    def begin(self, opt: Any) -> dict[Tensor, Tensor]:
        value = None if self._begin is None else self._begin(opt)
        return {} if value is None else {opt._owner(): value}

    def __get__(self, opt: Any, owner: type) -> Any:
        return self if opt is None else next(iter(opt._own_state[self.key].values()), None)

    def __set__(self, opt: Any, value: Tensor) -> None:
        kept = opt._own_state[self.key]
        for p, before in kept.items() or [(opt._owner(), None)]:
            if before is not None and (before.shape, before.dtype) == (value.shape, value.dtype):
                before.copy_(value)
            else:  # a copy, as it is written to from now on
                kept[p] = value.detach().clone()

    def fits(self, p: Tensor, tensor: Tensor) -> bool:
        return True


class RunValue(Generic[T]):
    """A number of a run, or a list of them, kept in ``param_groups[0]``.

    Args:
        start: its value in a new run. A list is replaced, never changed.
    """

    def __init__(self, start: T) -> None:
        self.start = start

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, opt: None, owner: type) -> RunValue[T]: ...
    @overload
    def __get__(self, opt: Any, owner: type) -> T: ...
    def __get__(self, opt: Any, owner: type) -> Any:
        if opt is None:
            return self
        value = opt.base.param_groups[0].get(f"{opt.prefix}_{self.name}", self.start)
        return int(value) if type(self.start) is int else value

    def __set__(self, opt: Any, value: T) -> None:
        opt.param_groups[0][f"{opt.prefix}_{self.name}"] = value


class ObjectState:
    """State of an object that moves in `backward`, as a generator's does.

    It is saved in ``param_groups[0]``, and put back where a GradScaler skips the step.

    Args:
        key: in the group, after the prefix.
        read: wrapper -> the object's state; None: there is nothing to keep.
        write: wrapper, state -> the object has that state.
        check: wrapper, first group of a state -> raises if the object cannot have the state there.
        fresh: whether the object starts anew where a loaded state has none.
    """

    def __init__(
        self,
        key: str,
        *,
        read: Callable[[Any], Any],
        write: Callable[[Any, Any], None],
        check: Callable[[Any, Group], None],
        fresh: bool,
    ) -> None:
        self.key, self.read, self.write = key, read, write
        self.check, self.fresh = check, fresh


class DeclaredState(NamedTuple):
    """The declarations of a class and its bases.

    Attributes:
        tensors: tensors in the entries of ``state``.
        values: name -> start of a value in the first group.
        objects: objects with state in the first group.
    """

    tensors: list[PerParameter]
    values: dict[str, Any]
    objects: list[ObjectState]


def declared_state(kind: type) -> DeclaredState:
    """The declarations of ``kind`` and its bases; looked for once."""
    found = vars(kind).get("_declared_state")
    if not isinstance(found, DeclaredState):
        named = {name: x for base in reversed(kind.__mro__) for name, x in vars(base).items()}
        found = DeclaredState(
            [x for x in named.values() if isinstance(x, PerParameter)],
            {name: x.start for name, x in named.items() if isinstance(x, RunValue)},
            [x for x in named.values() if isinstance(x, ObjectState)],
        )
        kind._declared_state = found  # type: ignore[attr-defined]
    return found
