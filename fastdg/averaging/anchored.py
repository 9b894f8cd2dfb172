"""Meta-iterations of several steps, which end between their first and their last weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._torch import not_compiled
from ..capture.graph_notes import hook_on
from ..core.batch import Batch
from ..core.closures import Forward, check_same
from ..core.declared_state import Group, PerParameter, PerRun, Rows, RunValue
from ..core.hyper import check_model, option
from ..core.optimizer import DomainOptimizer
from ..core.step_batch import StepBatch
from ..distributed.sharding import local, sharded
from .buffers import KINDS, Buffers, check_shapes, size_of, stored

ONE_DOMAIN = (
    "domains: {} steps on one domain after the other, so a batch must have samples of one domain"
)
SPLIT = (
    "Draw each batch from one domain, or split a mixed batch and call backward and step for each "
    "part (domains == d)."
)


@dataclass
class Single(Batch):
    """A micro-batch of one domain, whose id is on the device of the batch's ids."""

    domain: Tensor


def _inside(opt: Anchored, group: Group) -> Any:
    return group.get(f"{opt.prefix}_position")  # at position 0 a meta-iteration begins


def _buffers(kind: str) -> PerRun:
    def now(opt: Anchored) -> Tensor | None:
        return opt._buffers.now().get(kind)

    def count(opt: Anchored, group: Group) -> int:
        return size_of(now(opt))

    return PerRun(
        kind,
        f"{kind} at the start of the meta-iteration",
        rows=Rows("numbers", "the buffers of model=", count),
        begin=now,
        needed=_inside,
    )


class Anchored(DomainOptimizer):
    """Keeps the initial weights and buffers of a meta-iteration of `inner_steps` steps.

    Weights are copied at the first step; buffers of ``model``, which a forward may change, before
    the first forward. Weights that were changed since the last meta-iteration, in whatever way,
    begin the next one.
    """

    looks_at_samples = False
    _fleeting = ("_buffers", "_noted", "_shapes", "_begun", "_meta", "_gain", "_gains")
    _transient = (*DomainOptimizer._transient, *_fleeting)

    model: nn.Module | None = option(None, check_model, show=None)
    position = RunValue(0)  # number of inner steps in this meta-iteration
    kept = PerParameter(
        "kept",
        "weights at the start of the meta-iteration",
        begin=lambda opt: {p: p.detach().clone() for p in opt._names},
        needed=_inside,
    )
    buffers, counters = _buffers("buffers"), _buffers("counters")

    def _clear(self) -> None:
        super()._clear()
        self._noted: dict[str, Tensor] = {}  # buffers at the start of this meta-iteration
        self._shapes: dict[str, tuple[torch.Size, ...]] = {}  # of these
        self._begun = False
        self._meta: dict[str, Tensor] = {}  # statistics of the last meta step
        self._gain: Tensor | None = None  # of this inner step, if `_reads_grad`
        self._gains: Tensor | None = None  # of all so far; None after a load: unknown

    @abstractmethod
    def inner_steps(self) -> int:
        """The number of inner steps of a meta-iteration."""

    def order(self) -> Sequence[int]:
        """Return the domain of each inner step, for a closure."""
        return range(self.inner_steps())

    @abstractmethod
    def meta_step(self) -> dict[str, Tensor]:
        """End the meta-iteration, by `interpolate`, and return its statistics."""

    def objective(self, batch: StepBatch) -> Tensor:
        batch.log(**self._meta)
        return batch.loss

    def interpolate(self, rate: float) -> Tensor:
        """Set weights and buffers to ``kept + rate * (now - kept)``, in place.

        Integers are truncated.

        Returns:
            The squared distance between the weights before and the kept ones, 0-dim.
        """
        kept = self.kept
        alike: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
        for p in kept:
            alike.setdefault((p.device, p.dtype, sharded(p)), []).append(p)
        squares = {
            tensors[0]: ops.meta_step(
                [local(p.detach()) for p in tensors], [local(kept[p]) for p in tensors], rate
            )
            for tensors in alike.values()
        }
        self._buffers.interpolate(self._noted, rate)
        self._begun = False
        return self._ranks.sum(squares)

    @torch.no_grad()
    def follow(
        self, rows: Mapping[Tensor, Tensor], weigh: Callable[[Tensor], Tensor], rate: float
    ) -> dict[str, Tensor]:
        """Add a combination of rows to the weights, and `interpolate`.

        Args:
            rows: parameter -> R rows ``[R, *shape]``.
            weigh: Gram matrix of the rows ``[R, R]`` -> their weights ``[R]``.
            rate: of `interpolate`.

        Returns:
            The Gram matrix, the weights, and the result of `interpolate`, as ``trajectory``.
        """
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in self._names:  # in their order, which that of a loaded dict may not be
            if p in rows:
                alike.setdefault((p.device, p.dtype), []).append(p)
        several = {
            kind: [list(row) for row in zip(*(rows[p].unbind() for p in group), strict=True)]
            for kind, group in alike.items()
        }
        grams = [ops.gram(of_group) for of_group in several.values()]
        gram = grams[0] if len(grams) == 1 else sum(g.double().to(grams[0].device) for g in grams)
        assert isinstance(gram, Tensor)
        weights = weigh(gram)
        for kind, group in alike.items():
            for p, way in zip(group, ops.combine(several[kind], weights.to(kind[0])), strict=True):
                p.add_(way)
        return {"gram": gram, "weights": weights, "trajectory": self.interpolate(rate)}

    def progress(self) -> Tensor:
        """Return the inner product of ``.grad`` with the change of the weights so far, 0-dim."""
        products: dict[Tensor, Tensor] = {}
        for p, start in self.kept.items():
            if p.grad is not None:
                grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
                gram = ops.gram([[local(grad)], [local(p.detach() - start)]])
                products[p] = gram[0, 1]
        return self._ranks.sum(products)

    def evaluate_closure(self, forward: Forward) -> Tensor:
        if not forward.by_domain:
            return super().evaluate_closure(forward)
        if self.position:
            raise RuntimeError(
                f"closure: {type(self).__name__}.step(closure) runs a whole meta-iteration, but "
                f"{self.position} of the {self.inner_steps()} inner steps of this one are done. "
                "Finish it with backward and step."
            )
        return forward.steps(self.order())

    # -- batches of one domain --

    def _batch(self, losses: Tensor, domains: Tensor, terms: Tensor | None, **own: Any) -> Batch:
        batch = super()._batch(losses, domains, terms, **own)
        ids = domains if domains.device.type == "cpu" else batch.partition.domains
        problem = ONE_DOMAIN.format(type(self).__name__)
        check_same(ids, ids[0], problem, SPLIT)
        if self._micro_batches:
            first = self._micro_batches[0].domain.to(ids.device)
            check_same(ids, first, f"{problem}, with all micro-batches of a step", SPLIT)
        return Single(losses, batch.partition, batch.tracked, terms, batch.scale, ids[0])

    def _gradient(self, staged: Sequence[Any]) -> Tensor:
        if self._ranks.size > 1:
            (ids,) = (self._global_batch.count > 0).cpu().nonzero(as_tuple=True)
            problem = ONE_DOMAIN.format(type(self).__name__)
            check_same(ids, ids[0], f"{problem}, on all ranks", SPLIT)
        return super()._gradient(staged)

    # -- steps --

    @not_compiled
    def _prepare(self) -> None:
        self._keep()
        self._gain = -self.progress() if self.position and self._reads_grad else None

    def _undo(self) -> None:
        super()._undo()
        self._gain = None

    def _keep(self) -> None:
        kept = self.kept
        if self.position + 1 >= self.inner_steps():
            for kind in KINDS:  # before the step, as `interpolate` comes after it
                check_shapes(self._shapes.get(kind, ()), self._buffers.shapes(kind))
        if self.position == 0:
            for p, start in kept.items():
                kept[p] = stored(p.detach(), start)
            for kind, value in self._noted.items():
                owner = next(iter(self._own_state[kind]), None)
                self._own_state[kind][self._owner() if owner is None else owner] = value
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in kept:
                    kept[p] = p.detach().clone()

    def _skip(self) -> None:
        super()._skip()
        self._keep()
        self._commit()

    @not_compiled
    def _commit(self) -> None:
        if self.position == 0:
            self._gains = self._statistics["loss"].new_zeros(()) if self._reads_grad else None
        elif self._gain is not None:  # None: this step was skipped
            before = self._gain.new_full((), torch.nan) if self._gains is None else self._gains
            self._gains, self._gain = before + self._gain, None
        position = self.position + 1
        if position >= self.inner_steps():
            self._meta = self.meta_step()
            self._statistics = {**self._statistics, **self._meta}
            position = 0
        self.position = position

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and staged micro-batches."""
        super().zero_grad(set_to_none)
        self._begun = False

    # -- buffers --

    def _follow(self) -> None:
        """Find the buffers of the model, and hook the model to copy them before they change."""
        self._buffers = Buffers(self.model)
        if self.model is not None and self._buffers.places:
            hook_on(self.model.register_forward_pre_hook, self, "_before_forward")
        self._begin_here()

    def _before_forward(self, *seen: Any) -> None:
        """Copy the buffers before the model's first forward of a meta-iteration."""
        used = self._begun or self._ready or self._micro_batches
        if self.position == 0 and not used and torch.is_grad_enabled():
            self._note_buffers()
            self._begun = True

    def _note_buffers(self) -> None:
        self._note_shapes()
        for kind, value in self._buffers.now().items():
            self._noted[kind] = stored(value, self._noted.get(kind))

    def _note_shapes(self) -> None:
        self._shapes = {kind: self._buffers.shapes(kind) for kind in KINDS}

    # -- state and copies --

    def _start(self) -> None:
        super()._start()
        self._buffers = Buffers(self.model)

    def _finish_load(self) -> None:
        super()._finish_load()
        self._begin_here()

    def _begin_here(self) -> None:
        kept = self.kept
        kept.update({p: tensor.to(p.dtype) for p, tensor in kept.items()})
        if self.position == 0:
            self._note_buffers()
        else:
            self._note_shapes()
            for kind, value in self._buffers.now().items():
                start = next(iter(self._own_state[kind].values()), value)
                self._noted[kind] = start.to(value.dtype)
