"""A wrapper's view of the optimizer that it wraps."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..gradients.scale import UNSCALED
from ..selection import Selection, select
from .base_state import carried, forwarded


class Wrapping(Optimizer):
    """An optimizer that shares its groups, state and defaults with ``base``, by reference."""

    base: Optimizer
    prefix: str  # of the wrapper's own keys in ``state`` and ``param_groups``
    _ready: bool  # whether .grad holds this wrapper's gradient, which no step has used yet
    _loss_scale = UNSCALED  # of .grad, and of the staged micro-batches
    _outer: weakref.ref[Wrapping] | None = None  # the wrapper around this one
    _micro_batches: list[Any]  # results of `_batch`, or of `_on_micro_batch`
    _pending: Any  # kept from `_gradient` for `_commit`
    _before: dict[str, Any] | None = None  # states of objects before a step that may be skipped
    # A parameter and its .grad as `backward` has written it
    _owned_grad: tuple[Tensor, weakref.ref[Tensor]] | None = None
    _stepping = False  # whether this wrapper itself is stepping the optimizer inside
    _reads_grad = False  # whether `_prepare` reads .grad
    _resumed = False  # whether a state was loaded, and no step has followed
    # Parameters whose per-sample gradients the algorithm uses: "head" (the last layer before the
    # losses), "all", a list of names or parameters, or a predicate (name, parameter)
    params: Any = "all"
    _way_out: str | None = None  # advice in place of params= in messages of the statistics
    _statistics: dict[str, Tensor]
    _term_statistics: list[Any]  # of the terms, for each staged micro-batch
    # Or "term", inside of others; "ascent", around algorithms; "average", outermost
    role = "algorithm"
    around_algorithms = True  # of a wrapper of role "ascent"
    steps_without_closure = True  # one that does not cannot be in a wrapper of role "ascent"
    # Neither copied nor pickled: state of one forward or one model, and schedulers' patches on the
    # instance
    _transient: tuple[str, ...] = (
        "_tape",
        "_heads",
        "_micro_batches",
        "_term_statistics",
        "_ready",
        "_owned_grad",
        "_stepping",
        "_pending",
        "_before",
        "_statistics",
        "_loss_scale",
        "_model",
        "_outer",
        "_loaded",
        "_loaded_groups",
        "_group",
        "_ranks",
        "_global_batch",
        "_one_domain",
    )
    _patched = ("step", "_opt_called")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Lightning's LightningOptimizer derives from the class of the optimizer that it holds: the
        # attributes it inherits from a wrapper must be the held wrapper's
        imitation = cls.__bases__[0]
        if isinstance(getattr(imitation, "optimizer", None), property):
            for name in dir(cls):
                if not name.startswith("__") and not hasattr(imitation, name):
                    setattr(cls, name, _held(name))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def _size(self) -> int:
        return sum([len(group["params"]) for group in self.param_groups])

    def _mark_grad_owned(self) -> None:
        """Note that .grad holds this wrapper's gradient, for its next step."""
        self._ready = True
        parameters = (p for group in self.param_groups for p in group["params"])
        self._owned_grad = next(
            ((p, weakref.ref(p.grad)) for p in parameters if p.grad is not None), None
        )

    def _grad_is_owned(self) -> bool:
        """Return whether .grad still holds the gradient of `backward`: users may clear it."""
        if not self._ready or self._owned_grad is None:
            return False
        p, grad = self._owned_grad
        return p.grad is not None and p.grad is grad()

    def _release_grad(self) -> None:
        """Note that the gradient of `backward` is used or discarded."""
        self._ready, self._owned_grad, self._pending = False, None, None
        self._loss_scale = UNSCALED
        self._before = None

    def _step_base(self, *args: Any) -> Any:
        """Step the optimizer inside."""
        self._stepping = True
        try:
            return self.base.step(*args)
        finally:
            self._stepping = False

    def _step(self, closure: Callable[..., Any] | None) -> Tensor | None:
        """`step`, unless a GradScaler has called it."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Act right before the wrapped optimizer's step; own state changes after it."""

    def _undo(self) -> None:
        """Restore everything that `_prepare` has changed, after a step that raised."""

    def _skip(self) -> None:
        """Restore own state where a GradScaler skips the step."""

    def __getstate__(self) -> dict[str, Any]:
        dropped = (*self._transient, *self._patched)
        kept = {k: v for k, v in self.__dict__.items() if k not in dropped and "hook" not in k}
        return {**kept, "base": carried(self.base)}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if "base" not in self.__dict__:
                raise AttributeError(name)
            try:
                return forwarded(self.base, name)
            except AttributeError:
                message = f"{type(self).__name__!r} object has no attribute {name!r}"
                raise AttributeError(message) from None

    def settings(self) -> dict[str, Any]:
        """Return the wrapper's own settings, for ``repr`` and logs."""
        return {}

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self.settings().items())
        # torch shows all keys of a group, but this wrapper's settings are in the line above
        own = rf"\n *{self.prefix}_(?!steps:)\w+: .*(?:\n(?! *\w+: | *Parameter Group|\)| *$).*)*"
        inner = re.sub(own, "", repr(self.base), flags=re.MULTILINE).replace("\n", "\n  ")
        return f"{type(self).__name__}({shown}\n  {inner}\n)"


def _held(name: str) -> property:
    """Forward the attribute ``name`` to the optimizer that a LightningOptimizer holds."""
    return property(
        lambda self: getattr(self.optimizer, name),
        lambda self, value: setattr(self.optimizer, name, value),
    )


def check_base(base: Any, name: str) -> None:
    """Raise TypeError unless the wrapper ``name`` supports the optimizer ``base``."""
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"base: expected a torch.optim.Optimizer, got {type(base).__name__}. Pass one: "
            f"fastdg.{name}(torch.optim.Adam(model.parameters()))."
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base: {type(base).__name__} is not supported, because its step() needs a closure. "
            "Use SGD, Adam or another optimizer that steps without one."
        )


def check_result(result: Any, takes: Sequence[str] = ()) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Check a closure's result: ``(losses, domains)``, ``(losses, domains, inputs)``, or a list
    with the losses of each task.

    ``inputs`` is a dict, or the value itself for an algorithm that ``takes`` one input.
    """
    if isinstance(result, list):
        return result, None, {}  # type: ignore[return-value]
    if isinstance(result, tuple) and len(result) == 3:
        if isinstance(result[2], dict):
            return result
        if len(takes) == 1:
            return *result[:2], {takes[0]: result[2]}
    if not isinstance(result, tuple) or len(result) != 2:
        got = "None" if result is None else type(result).__name__
        raise TypeError(
            "closure: expected it to return (losses, domains), or to call opt.backward(losses, "
            f"domains) itself and return the loss, got {got}."
        )
    if isinstance(result[1], Tensor) and result[1].requires_grad:
        raise TypeError(
            "closure: expected (losses, domains), got two tensors with a graph. Return the losses "
            "of several tasks as a list, [loss_a, loss_b]."
        )
    return *result, {}


def names_of(
    groups: Sequence[dict[str, Any]], model: nn.Module | None, known: Mapping[Tensor, str]
) -> dict[Tensor, str]:
    """Name each parameter: as in the model, or as known, or as in the optimizer, or by its place.

    Returns:
        Parameter -> name.
    """
    given = {p: name for name, p in model.named_parameters()} if model is not None else {}
    names: dict[Tensor, str] = {}
    taken: set[str] = set()
    for g, group in enumerate(groups):
        texts = group.get("param_names") or [None] * len(group["params"])
        for i, (p, text) in enumerate(zip(group["params"], texts, strict=True)):
            name = given.get(p, known.get(p, text))
            if name is None or name in taken:  # two models may use the same names
                name = f"param_groups[{g}][{i}]"
            names[p] = name
            taken.add(name)
    return names


def check_params(
    params: Selection,
    names: Mapping[Tensor, str],
    groups: Sequence[dict[str, Any]],
    model: nn.Module | None,
) -> None:
    """Raise ValueError unless ``params`` selects parameters of the optimizer."""
    if model is not None and not any(p in names for p in model.parameters()):
        raise ValueError(
            f"model: the optimizer has none of the parameters of this {type(model).__name__}. "
            "Create the optimizer after the model, and do not copy the model in between."
        )
    texts = [item for item in params if isinstance(item, str)] if isinstance(params, list) else []
    if texts and model is None and "param_names" not in groups[0]:
        raise ValueError(
            f"params: the optimizer does not know names, got {texts[0]!r}. Pass model=, create the "
            "optimizer from model.named_parameters(), or pass the parameters themselves."
        )
    if not callable(params):
        select(params, {name: p for p, name in names.items()})
