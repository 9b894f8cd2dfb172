"""Wrappers of an optimizer, each a real ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.amp import GradScaler

from .._torch import quickly_stepped
from ..capture.head_output import HeadOutputs
from ..distributed.global_batch import GlobalBatch
from ..domains import as_ids, of_tasks, partition
from ..dtypes import to_statistics_dtype
from ..gradients.plain import recording, without_autocast
from ..gradients.tape import TrackedForward, check_losses
from . import amp, checkpoint, errors
from .backward import check_reached, poison_if_nonfinite, rollback_on_error
from .base_state import is_new
from .batch import Batch, counted
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
UNSEEN = TrackedForward()  # for losses whose graph no statistic needs
_USED = "fastdg_used"  # marks the graph of losses that had their backward


class DomainOptimizer(Configured):
    """Base of all wrappers: an algorithm is its `objective`, and `after_step` if it keeps state.

    An algorithm declares its arguments (`fastdg.core.hyper`). It needs an ``__init__`` of its own
    only to compute something from them.

    ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's own, not copies:
    schedulers, checkpoints and ``add_param_group`` work on either.

    Args:
        base: optimizer to wrap, also available as ``opt.base``.
        num_domains: number of training domains D; default: the domains seen so far.
        model: gives parameters their names in messages and in ``params``.
        check: has no effect any more: the row of each sample is found exactly.
        given: arguments that the class declares.

    The graph of the losses has all that is needed of a forward: no module has a hook. Statistics
    run backward from ``losses.sum()``, so hooks on activations see N times the gradient of
    ``losses.mean()``, and are also called in the backward for statistics.
    """

    compares = False  # whether it compares domains: a step of one domain is then plain training
    # Names of further inputs of `backward`, passed to `_batch`
    takes: ClassVar[tuple[str, ...]] = ()
    looks_at_logits = False  # whether the objective asks for `StepBatch.logit_products`
    looks_at_samples = True  # whether backwards for statistics run before the step's own
    _of_tasks = False  # whether the last losses were a list, one entry for each task
    _step_supports_amp_scaling = True  # torch.amp.GradScaler shows itself to `step`

    # -- training --

    def backward(
        self,
        losses: Tensor | Sequence[Tensor],
        domains: Tensor | int | None = None,
        final: bool = True,
        *,
        scaler: GradScaler | None = None,
        retain_graph: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """Add the algorithm's gradient to ``.grad``, in place of ``losses.mean().backward()``.

        Args:
            losses: one loss per sample ``[N]``, from ``reduction="none"``. Or a list with the
                losses of each task, ``[N]`` or 0-dim, from one forward; each task is a domain then.
            domains: domain of each sample ``[N]``, integer, on the device of ``losses`` or the CPU;
                or one domain for all samples. `DomainIds` makes ids from names.
            final: False stages this micro-batch (or one domain's own forward) and does not change
                ``.grad``; the next final call merges all staged micro-batches, weighted by their
                number of samples. The graphs of staged micro-batches stay alive until then, unless
                the wrapper computes their statistics at once.
            scaler: scales ``.grad`` only; pass unscaled ``losses``.
            retain_graph: keep the graph of ``losses`` for a further backward, as PyTorch's
                ``backward(retain_graph=True)``.
            inputs: inputs of the terms inside this wrapper (see there).

        Returns:
            The mean loss of all merged samples (of this micro-batch if not final), 0-dim, detached.

        Raises:
            TypeError, ValueError: ``losses``, ``domains``, ``scaler`` or ``inputs`` are not as
                described.
            RuntimeError: the losses depend on none of the parameters; backward was already called
                on these losses; another rank failed; staged micro-batches or ``.grad`` have another
                ``scaler``.

        Parameters outside the optimizer get a gradient, too, as by ``loss.backward()``: of the
        objective, or of the mean loss where gradients are combined. Autocast is off and gradients
        are on inside, so this may also be called in an autocast block or under ``torch.no_grad``.
        After an error ``.grad`` is as it was, and nothing is staged. A second final call before
        `step` adds to ``.grad``, as ``loss.backward()`` does.
        """
        again = self._grad_is_owned()
        try:
            self._ranks.begin(self, self.looks_at_samples)
            values, ids = of_tasks(losses, domains)
            tasks = list(losses) if values is not losses else []
            self._of_tasks = bool(tasks)
            self._refuse_used(tasks)
            with recording(), without_autocast(values):
                self._add_micro_batch(values, ids, scaler, inputs, retain_graph)
                for x in () if retain_graph else tasks:
                    _note(x)[_USED] = True
                if not final:
                    self._on_micro_batch()
                    self._ranks.end_step()
                    return to_statistics_dtype(values.detach()).mean()
                staged, self._micro_batches = self._micro_batches, []
                terms, self._term_statistics = self._term_statistics, []
                self._global_batch: GlobalBatch = self._meet(staged)
                self._note_objects()
                with rollback_on_error(self.param_groups, copied=not self._global_batch.alone):
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
        self,
        losses: Tensor,
        domains: Any,
        scaler: GradScaler | None,
        inputs: dict[str, Any],
        retain_graph: bool,
    ) -> None:
        check_losses(losses)
        domains = as_ids(domains, len(losses))
        checkpoint.catch_up(self)
        self._loss_scale = amp.loss_scale(self, scaler, losses)
        errors.refuse_groups(self.param_groups, type(self).__name__, self.penalises)
        self._count()
        self._refuse_used([losses])
        added = collect_penalties(terms_of(self), losses, inputs, type(self).__name__, self.takes)
        own = {name: inputs[name] for name in self.takes if name in inputs}
        batch = self._batch(losses, domains, added.values if added is not None else None, **own)
        batch.retain_graph = retain_graph
        if batch.tracked.chosen and not retain_graph:
            _note(losses)[_USED] = True
        self._micro_batches.append(batch)
        if added is not None:
            self._term_statistics.append(term_statistics(added))

    def _warn_of_slow(self, tracked: TrackedForward) -> None:
        """Warn once of slow parameters, but not of those that the losses of tasks share."""
        if tracked.slow and not self._of_tasks:
            self._tape.warn(tracked, _advice(type(self)))

    def _refuse_used(self, losses: Sequence[Tensor]) -> None:
        if any(_note(x).get(_USED) for x in losses):
            raise errors.used_twice(type(self).__name__)

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None, **own: Any) -> Batch:
        """Check a micro-batch and return it as it is staged; ``terms`` are added to its losses."""
        parts = partition(domains, losses, self.num_domains)
        tracked, output = UNSEEN, None
        if self.looks_at_logits:
            output, seen = self._heads.of(losses, own.get("logits"), self._tape, self.check)
            tracked = seen or UNSEEN
        elif self.looks_at_samples:
            tracked = self._tape.resolve(losses, warn=False)
            self._warn_of_slow(tracked)
        if tracked is UNSEEN:
            errors.refuse_again(losses, self._micro_batches, type(self).__name__)
        scale = self._loss_scale.scale
        return Batch(losses, parts, tracked, terms, scale, output=output, inputs=own)

    def _clear(self) -> None:
        super()._clear()
        self._heads = HeadOutputs()

    def _meet(self, staged: Sequence[Any]) -> GlobalBatch:
        """Return the batch of all ranks."""

        def used() -> list[str]:
            return sorted({name for batch in staged for name in batch.tracked.chosen})

        return self._met(*counted(staged), used)

    def _met(self, count: Tensor, samples: int, used: Callable[[], object]) -> GlobalBatch:
        by_rank, total = self._ranks.handshake(count, samples, used, lambda: settings_of(self))
        whole = count if by_rank is None else by_rank.sum(0)
        return GlobalBatch(self._ranks, whole, total, by_rank)

    def _on_micro_batch(self) -> None:
        """Process a staged micro-batch that is not the last."""

    # -- an algorithm implements these --

    def objective(self, batch: StepBatch) -> Tensor:
        """Return the value to minimise, 0-dim, differentiable; here the mean loss."""
        return batch.loss

    def after_step(self, record: StepRecord) -> None:
        """Update own state after the wrapped optimizer's step; no other method updates it."""

    def evaluate_closure(self, forward: Forward) -> Tensor:
        """Write the gradient of a step with a closure to ``.grad``; return the mean loss."""
        return forward.backward()

    # -- the step --

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

    def _commit(self) -> None:
        """Update own state after a step."""
        if self._pending is not None:  # set where the gradient came from an objective
            self.after_step(self._pending)

    @quickly_stepped
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Step the wrapped optimizer with the gradient that `backward` has written to ``.grad``.

        Args:
            closure: optional; returns ``(losses, domains)`` or ``(losses, domains, inputs)``, which
                are passed to `backward` first, or calls `backward` itself and returns the loss, as
                closures do in PyTorch. It is called once, with gradients enabled.

        Returns:
            With a closure, the mean loss or the closure's own result; else None.

        Raises:
            RuntimeError: `backward` was not called since the last step, or only with
                ``final=False``; or without the ``scaler`` that makes this call.
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
        if (staged := bool(self._micro_batches)) or not self._ready:
            if staged or not errors.is_probe(self.base):
                raise errors.no_backward(type(self).__name__, staged, closure is not None)
            if is_new(innermost(self.base)):
                self._step_base()
                checkpoint.begin(self, [p for p in self._names if p.grad is not None])
            return None
        self._advance()
        return loss

    def _advance(self) -> None:
        """Step with the gradient in ``.grad``, then update own state."""
        amp.refuse_scaled(self)
        try:
            self._prepare()
            self._step_base()
        except BaseException:
            self._undo()
            raise
        self.steps += 1
        self._commit()
        self._resumed = False
        self._release_grad()
        state = self.state
        for p, name, tensor in self._own_tensors():
            if p.grad is not None:  # the wrapped optimizer has created its own state by now
                state[p][name] = tensor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and staged micro-batches."""
        self._micro_batches, self._term_statistics = [], []
        self._release_grad()
        self.base.zero_grad(set_to_none)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Statistics of the last final `backward`: detached tensors, on the device."""
        return self._statistics


def _note(losses: Tensor) -> dict[str, Any]:
    """Return the notes on the graph of losses; of a leaf, a new dict."""
    note: Any = {} if losses.grad_fn is None else losses.grad_fn.metadata
    return note


def _advice(kind: type[DomainOptimizer]) -> str:
    """Advise the author of a class that needs no per-sample gradients."""
    if kind.objective.__module__.startswith("fastdg.") or not kind.looks_at_samples:
        return ""
    return (
        f" If {kind.__name__}.objective asks for no gradients of samples or domains, set "
        "looks_at_samples = False in the class"
    )


def check_objective(objective: Any, name: str) -> None:
    """Raise TypeError unless ``objective`` is a 0-dim tensor with a graph."""
    good = isinstance(objective, Tensor)
    if not good or objective.dim() != 0 or not objective.requires_grad:
        got = type(objective).__name__
        if good:
            graph = "" if objective.requires_grad else " without a graph"
            got = f"shape {tuple(objective.shape)}{graph}"
        raise TypeError(
            f"objective: {name}.objective must return a 0-dim tensor with its graph, got {got}. "
            "Compute it from batch.loss, batch.domain_losses or batch.moments()."
        )
