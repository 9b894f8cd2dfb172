"""What every wrapper is to PyTorch: a real ``torch.optim.Optimizer`` around another one."""

from __future__ import annotations

import inspect
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import InitVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from typing_extensions import Self

from ..distributed.ranks import Ranks
from ..domains import as_ids, partition
from ..gradients.explain import Explanation
from ..gradients.plain import without_autocast
from ..gradients.sharded import leaf_of
from ..gradients.tape import Tape, check_losses
from ..statistics.api import explain
from ..statistics.factors import accumulated
from . import amp, checkpoint, errors
from .base_optimizer import (
    all_or_nothing,
    check_base,
    check_extent,
    check_params,
    check_result,
    names_of,
)
from .base_state import is_new
from .batch import Batch, described
from .global_batch import Whole
from .hyper import Hyper, bound, check_keywords, declared, declared_signature, needed, own_signature
from .nesting import added_by, chain, check_order, innermost, merged, terms_of, told
from .one_domain import OneDomain
from .state import Stateful

Closure = Callable[..., Any]
_USED = "fastdg_used"  # on the graph of losses that had their backward


class DomainOptimizer(Stateful):
    """Base of all wrappers; an algorithm implements `_gradient`, and `_commit` if it keeps state.

    Its arguments an algorithm declares (`fastdg.core.hyper`); an ``__init__`` of its own it needs
    only to make something of them.

    ``param_groups``, ``state`` and ``defaults`` are those of the wrapped optimizer, not copies:
    schedulers, checkpoints and ``add_param_group`` work on either.

    Args:
        base: the optimizer to wrap (also kept as ``opt.base``).
        num_domains: number of training domains D; default: as many as have been seen.
        model: its parameters' names are those of messages, and of ``params``.
        check: has no effect any more: which row belongs to which sample is found exactly.
        given: what the class declares.

    All that is needed of a forward is in the graph of its losses: no module has a hook. Statistics
    run backward from ``losses.sum()``, so hooks on activations see N times the gradient that
    ``losses.mean()`` gives them (and are also called for the statistics' sake).
    """

    if TYPE_CHECKING:  # the arguments of every wrapper, before those that its class declares
        base: Optimizer = needed(lambda base: base, kw_only=False)
        num_domains: int | None = None
        model: InitVar[nn.Module | None] = None
        check: bool = True

    compares = False  # the domains of a step, so that a step of one domain is plain training
    penalises = True  # adds a term that an optimizer which ascends would turn around
    looks_at_samples = True  # whether backwards for statistics run before that of the step
    _step_supports_amp_scaling = True  # torch.amp.GradScaler shows itself to `step`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = (  # type: ignore[attr-defined]
            declared_signature(cls, COMMON)
            if cls.__init__ is DomainOptimizer.__init__
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
        self._kept: dict[str, dict[Tensor, Tensor]] = {name: {} for name in self.tensors}
        self._names = names_of(self.param_groups, model, self._known())
        check_params(self.params, self._names, self.param_groups, model)
        Optimizer.__setstate__(self, {})  # every hook table torch knows, and nothing else
        self._look(model)
        self._clear()
        checkpoint.attach(self)
        self._given = {"steps": 0, **self._counters(), **hypers}
        self.param_groups[0].update({f"{self.prefix}_{k}": v for k, v in hypers.items()})
        self._fill()
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

    # -- training --

    def backward(
        self,
        losses: Tensor,
        domains: Tensor | int | None = None,
        final: bool = True,
        *,
        scaler: GradScaler | None = None,
        **inputs: Any,
    ) -> Tensor:
        """In place of ``losses.mean().backward()``: adds the algorithm's gradient to ``.grad``.

        Args:
            losses: one loss a sample ``[N]``, from ``reduction="none"``.
            domains: domain of each sample ``[N]``, integer, on the device of ``losses`` or the CPU;
                or the one of all samples. Of names, `DomainIds` makes them.
            final: False stages this micro-batch (or one domain's own forward) and leaves ``.grad``
                alone; the next final call merges everything staged, weighted by the number of
                samples. The graphs of staged micro-batches stay alive until then, unless the
                wrapper takes what it needs of them at once.
            scaler: its factor goes into ``.grad`` alone; ``losses`` are passed without it.
            inputs: what the terms inside this wrapper ask for (see there).

        Returns:
            The mean loss of everything merged (of this micro-batch if not final), 0-dim, detached.

        Raises:
            TypeError, ValueError: ``losses``, ``domains``, ``scaler`` or ``inputs`` are not as
                described.
            RuntimeError: the losses depend on none of the parameters; backward was already called
                on these losses; another rank failed; what is staged or in ``.grad`` was not made
                with this ``scaler``.

        Autocast is off and gradients are on inside, so that this may be called in an autocast block
        or under ``torch.no_grad``, too. After an error ``.grad`` is as it was, and nothing is
        staged. A second final call before `step` adds to ``.grad``, as ``loss.backward()`` does.
        """
        again = self._is_there()
        try:
            self._ranks.begin(self, self.looks_at_samples)
            with torch.enable_grad(), without_autocast(losses):
                self._stage(losses, domains, scaler, inputs)
                if not final:
                    self._defer()
                    self._ranks.part()
                    return accumulated(losses.detach()).mean()
                (staged, heard), self._staged, self._told = (self._staged, self._told), [], []
                self._whole: Whole = self._meet(staged)
                with all_or_nothing(self.param_groups, copied=self._ranks.size > 1):
                    loss = self._gradient(staged)
            self._statistics = merged(heard, self._statistics, self._whole)
        except BaseException as error:
            self._staged, self._told = [], []
            errors.explain(error, self._way_out)
            self._ranks.part(error if final else None)
            raise
        self._ranks.part()
        for link in chain(self):
            link._leave()
            link._scaler = self._scaler
        amp.give_away(self)
        self._one_domain.watch(self, again)
        return loss

    def _stage(
        self, losses: Tensor, domains: Any, scaler: GradScaler | None, inputs: dict[str, Any]
    ) -> None:
        check_losses(losses)
        domains = as_ids(domains, len(losses))
        checkpoint.catch_up(self)
        self._scale = amp.factor(self, scaler, losses)
        errors.refuse_groups(self.param_groups, type(self).__name__, self.penalises)
        self._count()
        note: Any = losses.grad_fn.metadata  # type: ignore[union-attr]
        if note.get(_USED):
            raise errors.used_twice(type(self).__name__)
        added = added_by(terms_of(self), losses, inputs, type(self).__name__)
        batch = self._batch(losses, domains, added.values if added is not None else None)
        if batch.resolved.chosen:
            note[_USED] = True
        self._staged.append(batch)
        if added is not None:
            self._told.append(told(added))

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None) -> Batch:
        """What to stage of a micro-batch, and of what terms add to it; every check on it."""
        parts = partition(domains, losses, self.num_domains)
        resolved = self._tape.resolve(losses)
        return Batch(losses, parts, resolved, terms, self._scale)

    def _meet(self, staged: Sequence[Any]) -> Whole:
        """What this rank's batch is a part of."""
        return self._ranks.meet(*described(staged))

    def _defer(self) -> None:
        """Called after a micro-batch that is not the last was staged."""

    @abstractmethod
    def _gradient(self, staged: Sequence[Any]) -> Tensor:
        """Add the gradient to ``.grad``, fill ``_statistics``, return the mean loss, detached."""

    def _prepare(self) -> None:
        """Called right before the wrapped optimizer steps."""

    def _commit(self) -> None:
        """Called after the wrapped optimizer has stepped: the only place where own state moves."""

    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One step of the wrapped optimizer on the gradient that `backward` left in ``.grad``.

        Args:
            closure: optional; returns ``(losses, domains)`` or ``(losses, domains, inputs)``, which
                are passed to `backward` first, or calls `backward` itself and returns the loss, as
                closures do in PyTorch. It is called once, with gradients enabled.

        Returns:
            The mean loss if a closure was given, or what that returned, else None.

        Raises:
            RuntimeError: `backward` was not called since the last step, or not with ``final=True``;
                or was not given the ``scaler`` that makes this call.
        """
        if "found_inf" in self.__dict__:
            amp.step(self, closure)
            return None
        return self._step(closure)

    def _step(self, closure: Closure | None) -> Tensor | None:
        loss = None
        if closure is not None:
            ready, self._ready = self._ready, False
            with torch.enable_grad():
                loss = self._evaluate(closure)
            self._ready |= ready
        if self._staged or not self._ready:
            if self._staged or not errors.is_probe(self.base):
                raise errors.no_backward(type(self).__name__, bool(self._staged))
            if is_new(innermost(self.base)):
                self._step_base()
                checkpoint.begin(self, [p for p in self._names if p.grad is not None])
            return None
        self._advance()
        return loss

    def _evaluate(self, closure: Closure) -> Tensor:
        """Run the closure of a `step`, and backward on what it returns if it has not done so."""
        result = closure()
        if self._ready or result is None:
            return result
        losses, domains, inputs = check_result(result)
        return self.backward(losses, domains, **inputs)

    def _advance(self) -> None:
        """Step on the gradient there is, and let own state follow."""
        amp.refuse_scaled(self)
        self._prepare()
        self._step_base()
        self.param_groups[0][f"{self.prefix}_steps"] = self.steps + 1
        self._commit()
        self._done()
        for p, name, tensor in self._own_tensors():
            if p.grad is not None:  # the wrapped optimizer has made its own state by now
                self.state[p][name] = tensor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and whatever `backward` has staged or left for `step`."""
        self._staged, self._told = [], []
        self._done()
        self.base.zero_grad(set_to_none)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What the last final `backward` saw: detached tensors, on the device."""
        return self._statistics

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
            inner = isinstance(self.base, DomainOptimizer)
            self._ranks: Ranks = self.base._ranks if inner else Ranks(self)  # type: ignore[attr-defined]
        engines = self._ranks.engines  # which do not hold this wrapper
        self._tape: Tape = Tape(self._names, self.params, leaf_of(lambda: list(engines.modules)))
        self._counted = self._size()

    def _known(self) -> dict[Tensor, str]:
        """Names of parameters that wrappers inside have."""
        return self.base._names if isinstance(self.base, DomainOptimizer) else {}

    def _clear(self) -> None:
        self._staged, self._told, self._statistics = [], [], {}
        self._done()

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
    for p in list(inspect.signature(DomainOptimizer.__init__).parameters.values())[1:]
    if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
]
DomainOptimizer.__init_subclass__.__func__(DomainOptimizer)  # type: ignore[attr-defined]
