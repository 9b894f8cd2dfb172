"""What every wrapper is to PyTorch: a real ``torch.optim.Optimizer`` around another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from ..capture.head_output import HeadOutputs
from ..distributed.global_batch import GlobalBatch
from ..domains import as_ids, partition
from ..dtypes import to_statistics_dtype
from ..gradients.plain import without_autocast
from ..gradients.tape import TrackedForward, check_losses
from . import amp, checkpoint, errors
from .backward import check_reached, poison_if_nonfinite, rollback_on_error
from .base_state import is_new
from .batch import Batch, described
from .closures import Forward
from .configured import Configured
from .nesting import (
    chain,
    collect_penalties,
    innermost,
    merged,
    settings_of,
    term_statistics,
    terms_of,
)
from .step_batch import StepBatch, StepRecord

Closure = Callable[..., Any]
UNSEEN = TrackedForward()  # of losses whose graph nobody looks at
_USED = "fastdg_used"  # on the graph of losses that had their backward


class DomainOptimizer(Configured):
    """Base of all wrappers: an algorithm is its `objective`, and `after_step` if it keeps state.

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

    compares = False  # the domains of a step, so that a step of one domain is plain training
    takes: tuple[str, ...] = ()  # names of further inputs of `backward`, handed to `_batch`
    looks_at_logits = False  # whether the objective asks for `StepBatch.logit_products`
    looks_at_samples = True  # whether backwards for statistics run before that of the step
    _step_supports_amp_scaling = True  # torch.amp.GradScaler shows itself to `step`

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
        again = self._grad_is_owned()
        try:
            self._ranks.begin(self, self.looks_at_samples)
            with torch.enable_grad(), without_autocast(losses):
                self._add_micro_batch(losses, domains, scaler, inputs)
                if not final:
                    self._on_micro_batch()
                    self._ranks.end_step()
                    return to_statistics_dtype(losses.detach()).mean()
                staged, self._micro_batches = self._micro_batches, []
                terms, self._term_statistics = self._term_statistics, []
                self._global_batch: GlobalBatch = self._meet(staged)
                self._note_objects()
                with rollback_on_error(self.param_groups, copied=self._ranks.size > 1):
                    loss = self._gradient(staged)
            self._statistics = merged(terms, self._statistics, self._global_batch)
        except BaseException as error:
            self._micro_batches, self._term_statistics = [], []
            errors.explain(error, self._way_out)
            self._ranks.end_step(error if final else None)
            raise
        self._ranks.end_step()
        for link in chain(self):
            link._mark_grad_owned()
            link._loss_scale = self._loss_scale
        if self._loss_scale.scaler is not None:
            kept = (self._statistics.get(key) for key in ("penalty", "objective"))
            poison_if_nonfinite(self.param_groups, [x for x in kept if x is not None])
        self._one_domain.watch(self, again)
        return loss

    def _add_micro_batch(
        self, losses: Tensor, domains: Any, scaler: GradScaler | None, inputs: dict[str, Any]
    ) -> None:
        check_losses(losses)
        domains = as_ids(domains, len(losses))
        checkpoint.catch_up(self)
        self._loss_scale = amp.loss_scale(self, scaler, losses)
        errors.refuse_groups(self.param_groups, type(self).__name__, self.penalises)
        self._count()
        note: Any = losses.grad_fn.metadata  # type: ignore[union-attr]
        if note.get(_USED):
            raise errors.used_twice(type(self).__name__)
        added = collect_penalties(terms_of(self), losses, inputs, type(self).__name__, self.takes)
        own = {name: inputs[name] for name in self.takes if name in inputs}
        batch = self._batch(losses, domains, added.values if added is not None else None, **own)
        if batch.resolved.chosen:
            note[_USED] = True
        self._micro_batches.append(batch)
        if added is not None:
            self._term_statistics.append(term_statistics(added))

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None, **own: Any) -> Batch:
        """What to stage of a micro-batch, and of what terms add to it; every check on it."""
        parts = partition(domains, losses, self.num_domains)
        resolved, output = UNSEEN, None
        if self.looks_at_logits:
            output, seen = self._heads.of(losses, own.get("logits"), self._tape, self.check)
            resolved = seen or UNSEEN
        elif self.looks_at_samples:
            resolved = self._tape.resolve(losses, warn=False)
            self._tape.warn(resolved, _advice(type(self)))
        if resolved is UNSEEN:
            errors.refuse_again(losses, self._micro_batches, type(self).__name__)
        return Batch(losses, parts, resolved, terms, self._loss_scale.scale, output=output)

    def _clear(self) -> None:
        super()._clear()
        self._heads = HeadOutputs()

    def _meet(self, staged: Sequence[Any]) -> GlobalBatch:
        """What this rank's batch is a part of."""
        return self._met(*described(staged))

    def _met(self, count: Tensor, samples: int, used: object) -> GlobalBatch:
        counts, total = self._ranks.handshake(count, samples, used, lambda: settings_of(self))
        return GlobalBatch(self._ranks, counts, total)

    def _on_micro_batch(self) -> None:
        """Called after a micro-batch that is not the last was staged."""

    # -- what an algorithm implements --

    def objective(self, batch: StepBatch) -> Tensor:
        """The function of the step to descend, 0-dim, differentiable; here the mean loss."""
        return batch.loss

    def after_step(self, record: StepRecord) -> None:
        """Called after the wrapped optimizer has stepped: the only place where own state moves."""

    def evaluate_closure(self, forward: Forward) -> Tensor:
        """Leave in ``.grad`` the gradient of a step with a closure; returns the mean loss."""
        return forward.backward()

    # -- what the machinery makes of it --

    def _gradient(self, staged: Sequence[Any]) -> Tensor:
        """Add the gradient to ``.grad``, fill ``_statistics``, return the mean loss, detached."""
        batch = StepBatch(
            staged, self._global_batch, self._known_domains(), self.steps == 0, self.params
        )
        objective = self.objective(batch)
        check_objective(objective, type(self).__name__)
        batch.backward(objective)
        check_reached(self.param_groups, type(self).__name__)
        self._pending, self._statistics = batch.record(), batch.statistics
        return batch.statistics["loss"]

    def _prepare(self) -> None:
        """Called right before the wrapped optimizer steps."""

    def _commit(self) -> None:
        """Let own state follow a step."""
        if self._pending is not None:  # the objective's own, where the gradient came from it
            self.after_step(self._pending)

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
                loss = self.evaluate_closure(Forward(self, closure))
            if loss is not None and not (self._ready or self._micro_batches):
                self._mark_grad_owned()  # an algorithm has written .grad itself
                self._ready = self._owned_grad is not None
            self._ready |= ready
        if self._micro_batches or not self._ready:
            if self._micro_batches or not errors.is_probe(self.base):
                raise errors.no_backward(type(self).__name__, bool(self._micro_batches))
            if is_new(innermost(self.base)):
                self._step_base()
                checkpoint.begin(self, [p for p in self._names if p.grad is not None])
            return None
        self._advance()
        return loss

    def _advance(self) -> None:
        """Step on the gradient there is, and let own state follow."""
        amp.refuse_scaled(self)
        self._prepare()
        self._step_base()
        self.steps += 1
        self._commit()
        self._resumed = False
        self._release_grad()
        for p, name, tensor in self._own_tensors():
            if p.grad is not None:  # the wrapped optimizer has made its own state by now
                self.state[p][name] = tensor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and whatever `backward` has staged or left for `step`."""
        self._micro_batches, self._term_statistics = [], []
        self._release_grad()
        self.base.zero_grad(set_to_none)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What the last final `backward` saw: detached tensors, on the device."""
        return self._statistics


def _advice(kind: type[DomainOptimizer]) -> str:
    """What a user's own class may say to cost less."""
    if kind.objective.__module__.startswith("fastdg.") or not kind.looks_at_samples:
        return ""
    return (
        f" If {kind.__name__}.objective asks for no gradients of samples or domains, write "
        "looks_at_samples = False in the class"
    )


def check_objective(objective: Any, name: str) -> None:
    """Raise unless an algorithm has returned something to descend."""
    good = isinstance(objective, Tensor)
    if not good or objective.dim() != 0 or not objective.requires_grad:
        got = type(objective).__name__
        if good:
            graph = "" if objective.requires_grad else " without a graph"
            got = f"shape {tuple(objective.shape)}{graph}"
        raise TypeError(
            f"objective: {name}.objective has to return a 0-dim tensor with its graph, got {got}. "
            "Make it of batch.loss, batch.domain_losses or batch.moments()."
        )
