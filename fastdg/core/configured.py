"""A wrapper with its arguments, the parameters that it looks at, its groups and its copies."""

from __future__ import annotations

import inspect
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
from .base_optimizer import check_base, check_extent, check_params, names_of
from .hyper import (
    Hyper,
    bound,
    check_keywords,
    declared,
    declared_signature,
    needed,
    own_signature,
)
from .nesting import check_order
from .one_domain import OneDomain
from .state import Stateful


class Configured(Stateful):
    """Takes the arguments that its class declares, and follows what the optimizer is given."""

    if TYPE_CHECKING:  # the arguments of every wrapper, before those that its class declares
        base: Optimizer = needed(lambda base: base, kw_only=False)
        num_domains: int | None = None
        model: InitVar[nn.Module | None] = None
        check: bool = True

    penalises = True  # adds a term that an optimizer which ascends would turn around

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "prefix") and not cls.__module__.startswith("fastdg."):
            cls.prefix = cls.__name__.lower()
        cls.__signature__ = (  # type: ignore[attr-defined]
            declared_signature(cls, COMMON)
            if cls.__init__ is Configured.__init__
            else own_signature(cls.__init__)
        )

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        check_keywords(cls, keywords)
        return super().__new__(cls)

    def __init__(
        self,
        base: Optimizer,
        *places: Any,
        num_domains: int | None = None,
        model: nn.Module | None = None,
        check: bool = True,
        **given: Any,
    ) -> None:
        if not hasattr(type(self), "prefix"):
            raise TypeError(
                f"{type(self).__name__}: it is a base class. Derive from it and write objective(), "
                "or use fastdg.ERM."
            )
        check_order(self, base)
        check_base(base, type(self).__name__)
        errors.refuse_groups(base.param_groups, type(self).__name__, self.penalises)
        check_extent(num_domains, model)
        self.base = base
        self.num_domains = num_domains
        self.check = check
        values, kinds = bound(type(self), places, given), declared(type(self))
        hypers = {name: values[name] for name, o in kinds.items() if isinstance(o, Hyper)}
        for name in values.keys() - hypers.keys():
            setattr(self, name, values[name])
        self._start()
        self._own_state: dict[str, dict[Tensor, Tensor]] = {name: {} for name in self.tensors}
        self._names = names_of(self.param_groups, model, self._known())
        check_params(self.params, self._names, self.param_groups, model)
        Optimizer.__setstate__(self, {})  # every hook table torch knows, and nothing else
        self._look(model)
        self._clear()
        checkpoint.attach(self)
        self._given = {"steps": 0, **self._counters(), **hypers}
        self.param_groups[0].update({f"{self.prefix}_{k}": v for k, v in hypers.items()})
        self._set_defaults()
        checkpoint.adopt(self)
        self._group = self.param_groups[0]

    def _start(self) -> None:
        """Called once, by the constructor, before anything is made of its arguments."""

    def _counters(self) -> dict[str, Any]:
        """What a new run has in the first group beside the hyper-parameters and ``steps``."""
        return {}

    @property
    def steps(self) -> int:
        """Steps taken so far; kept in ``param_groups`` and so in every checkpoint."""
        return int(self.param_groups[0].get(f"{self.prefix}_steps", 0))

    @property
    def tape(self) -> Tape:
        """The parameters that this wrapper looks at, for `fastdg.domain_gram` and the like."""
        return self._tape

    def explain(self, losses: Tensor) -> Explanation:
        """A table of how the per-sample gradients of each parameter are made, and at which cost.

        Args, errors: as `fastdg.explain`; ``losses [N]`` with their graph, which is kept.

        Example:
            >>> print(opt.explain(losses))
        """
        return explain(losses, self.tape)

    # -- groups, copies --

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer, from the next `backward` on."""
        self.base.add_param_group(param_group)
        self._count()

    def _count(self) -> None:
        """Look at parameters that the optimizer inside was given."""
        if self._size() == self._counted:
            return
        model = self._model() if self._model is not None else None
        self._names = names_of(self.param_groups, model, {**self._names, **self._known()})
        self._look(model)

    def _look(self, model: nn.Module | None) -> None:
        """Look at the optimizer's parameters, some of which have the names of ``model``."""
        self._model = weakref.ref(model) if model is not None else None
        if "_one_domain" not in self.__dict__:
            self._one_domain: OneDomain = OneDomain()
        if "_ranks" not in self.__dict__:
            inner = isinstance(self.base, Configured)
            self._ranks: Ranks = self.base._ranks if inner else Ranks(self)  # type: ignore[attr-defined]
        wrapped = self._ranks.modules  # which do not hold this wrapper
        self._tape: Tape = Tape(self._names, self.params, leaf_of(lambda: list(wrapped.modules)))
        self._counted = self._size()

    def _known(self) -> dict[Tensor, str]:
        """Names of parameters that wrappers inside have."""
        return self.base._names if isinstance(self.base, Configured) else {}

    def _clear(self) -> None:
        self._micro_batches, self._term_statistics, self._statistics = [], [], {}
        self._release_grad()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.base = state["base"]  # torch's __setstate__ reads defaults, which are the base's
        Optimizer.__setstate__(self, state)
        self._look(None)
        self._clear()
        checkpoint.attach(self)
        self._group = self.param_groups[0]

    def settings(self) -> dict[str, Any]:
        """The wrapper's own settings, for ``repr`` and logs."""
        own = {name: getattr(self, name) for name in declared(type(self))}
        if isinstance(own.get("params"), list):
            own["params"] = [self._names[p] if isinstance(p, Tensor) else p for p in self.params]
        return {**own, "num_domains": self.num_domains}


# `base` and the keywords of every wrapper, without self, the places and the rest
COMMON = [
    p
    for p in list(inspect.signature(Configured.__init__).parameters.values())[1:]
    if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
]
Configured.__init_subclass__.__func__(Configured)  # type: ignore[attr-defined]
