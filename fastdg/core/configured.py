"""Constructor of a wrapper, its tracked parameters, parameter groups and copies."""

from __future__ import annotations

import weakref
from dataclasses import InitVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from ..distributed.ranks import Ranks
from ..gradients.explain import Explanation
from ..gradients.sharded import leaf_of
from ..gradients.tape import Tape
from ..statistics.api import explain
from . import checkpoint, errors
from .base_optimizer import check_base, check_params, names_of
from .declared_state import RunValue, declared_state
from .hyper import (
    NEEDED,
    Hyper,
    NotKept,
    argument,
    bound,
    check_extent,
    check_keywords,
    check_model,
    declared,
    declared_signature,
    option,
    own_signature,
)
from .nesting import check_order
from .one_domain import OneDomain
from .state import Stateful


class Configured(Stateful):
    """A wrapper with declared arguments, which tracks the optimizer's parameters."""

    if TYPE_CHECKING:  # type checkers see it before the declared arguments
        base: Optimizer = argument(kw_only=False)
    num_domains: int | None = option(None, check_extent)
    model: InitVar[nn.Module | None] = NotKept(None, check_model)
    check: bool = option(True, show=None)

    penalises = True  # whether it adds a penalty, which maximize=True would turn around

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "prefix") and not cls.__module__.startswith("fastdg."):
            cls.prefix = cls.__name__.lower()
        cls.__signature__ = (  # type: ignore[attr-defined]
            declared_signature(cls)
            if cls.__init__ is Configured.__init__
            else own_signature(cls.__init__)
        )

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        check_keywords(cls, keywords)
        return super().__new__(cls)

    def __init__(self, base: Any = NEEDED, *places: Any, **given: Any) -> None:
        name = type(self).__name__
        if not hasattr(type(self), "prefix"):
            raise TypeError(
                f"{name}: a base class has no instances. Derive from it and write objective(), or "
                'use fastdg.ERM. A class of the package itself sets prefix = "name".'
            )
        if base is NEEDED:
            raise TypeError(
                f"base: {name} needs an optimizer to wrap, got none. Pass one: "
                f"fastdg.{name}(torch.optim.Adam(model.parameters()))."
            )
        check_order(self, base)
        check_base(base, name)
        errors.refuse_groups(base.param_groups, name, self.penalises)
        values, kinds = bound(type(self), places, given), declared(type(self))
        self.base = base
        for key, o in kinds.items():
            if not isinstance(o, (Hyper, NotKept)):
                setattr(self, key, values[key])
        hypers = {
            key: o.fill(self) if values[key] is None and o.fill is not None else values[key]
            for key, o in kinds.items()
            if isinstance(o, Hyper)
        }
        self._start()
        self._own_state: dict[str, dict[Tensor, Tensor]] = {
            state.key: {} for state in declared_state(type(self)).tensors
        }
        model = values.get("model")
        self._names = names_of(self.param_groups, model, self._known())
        check_params(self.params, self._names, self.param_groups, model)
        Optimizer.__setstate__(self, {})  # every hook table torch knows, and nothing else
        self._look(model)
        self._clear()
        checkpoint.attach(self)
        objects = {x.key: x.read(self) for x in declared_state(type(self)).objects if x.fresh}
        self._given = {**declared_state(type(self)).values, **objects, **hypers}
        self.param_groups[0].update({f"{self.prefix}_{k}": v for k, v in hypers.items()})
        self._set_defaults()
        checkpoint.adopt(self)
        self._group = self.param_groups[0]
        self._follow()

    def _start(self) -> None:
        """Create attributes that the constructor needs; called once, before state is created."""

    def _follow(self) -> None:
        """Register hooks on given modules; called at the end of the constructor and of a copy."""

    steps = RunValue(0)  # steps so far

    @property
    def tape(self) -> Tape:
        """Tracked parameters of this wrapper, for `fastdg.domain_gram` and similar functions."""
        return self._tape

    def explain(self, losses: Tensor) -> Explanation:
        """Return a table of the method and the cost of each parameter's per-sample gradients.

        Args, errors: as in `fastdg.explain`; ``losses [N]`` with their graph, which stays alive.

        Example:
            >>> print(opt.explain(losses))
        """
        return explain(losses, self.tape)

    # -- groups, copies --

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; it counts from the next `backward` on."""
        self.base.add_param_group(param_group)
        self._count()

    def _count(self) -> None:
        """Track parameters that were added to the wrapped optimizer."""
        if self._size() == self._counted:
            return
        model = self._model() if self._model is not None else None
        self._names = names_of(self.param_groups, model, {**self._names, **self._known()})
        self._look(model)

    def _look(self, model: nn.Module | None) -> None:
        """Track the optimizer's parameters; ``model`` gives some of them their names."""
        self._model = weakref.ref(model) if model is not None else None
        if isinstance(self.base, Configured):
            self.base._outer = weakref.ref(self)
        if "_one_domain" not in self.__dict__:
            self._one_domain: OneDomain = OneDomain()
        if "_ranks" not in self.__dict__:
            inner = isinstance(self.base, Configured)
            self._ranks: Ranks = self.base._ranks if inner else Ranks(self)  # type: ignore[attr-defined]
        wrapped = self._ranks.modules  # these hold no reference to this wrapper
        self._tape: Tape = Tape(self._names, self.params, leaf_of(lambda: list(wrapped.modules)))
        self._counted = self._size()

    def _known(self) -> dict[Tensor, str]:
        """Return the parameters' names in the wrappers inside."""
        return self.base._names if isinstance(self.base, Configured) else {}

    def _clear(self) -> None:
        self._micro_batches, self._term_statistics, self._statistics = [], [], {}
        self._release_grad()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.base = state["base"]  # torch's __setstate__ reads defaults, a property of the base
        Optimizer.__setstate__(self, state)
        self._look(vars(self).get("model"))
        self._clear()
        checkpoint.attach(self)
        self._group = self.param_groups[0]
        self._follow()

    def settings(self) -> dict[str, Any]:
        """Return the wrapper's own settings, for ``repr`` and logs."""
        own = {
            name: o.show(getattr(self, name))
            for name, o in declared(type(self)).items()
            if o.show is not None
        }
        if isinstance(own.get("params"), list):
            own["params"] = [self._names[p] if isinstance(p, Tensor) else p for p in self.params]
        return own


Configured.__init_subclass__.__func__(Configured)  # type: ignore[attr-defined]
