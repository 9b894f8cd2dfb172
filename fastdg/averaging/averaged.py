"""Averaged weights: a copy of the model with them, or the model itself."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from .._torch import not_compiled
from ..core import amp, errors
from ..core.base_optimizer import check_result
from ..core.base_state import is_new
from ..core.checkpoint import begin
from ..core.declared_state import PerParameter, Rows, RunValue
from ..core.nesting import innermost
from ..core.optimizer import Closure
from ..distributed.sharding import reshard
from ..dtypes import to_statistics_dtype
from ..outer.outer import OuterOptimizer
from .averages import Segments, finite

_average = get_swa_multi_avg_fn()
_WAY = (
    "save with torch.save, or convert its files to one file with "
    "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
)
_SEGMENTS = Rows(
    "segments",
    "the number of saved losses",
    lambda opt, group: len(group.get(f"{opt.prefix}_losses", ())),
)


def _zeros(opt: Averaged) -> dict[Tensor, Tensor]:
    like = [p for parameters in opt._alike() for p in parameters]
    return {p: torch.zeros_like(to_statistics_dtype(p.detach())) for p in like}


def _none(opt: Averaged) -> dict[Tensor, Tensor]:
    return {p: zero.new_zeros((0, *zero.shape)) for p, zero in _zeros(opt).items()}


class Averaged(OuterOptimizer):
    """Base of wrappers that keep an average of the weights beside the model.

    The weights after every step join the mean of a segment. The class decides which segments join
    the average, see `Segments`.
    """

    role = "average"
    model: nn.Module
    _shown = False  # whether the model has the averaged weights, inside `applied`
    _transient = (*OuterOptimizer._transient, "_shown")

    segment = PerParameter("segment", "average of a segment", begin=_zeros, way=_WAY)
    pending = PerParameter("pending", "pending averages", rows=_SEGMENTS, begin=_none, way=_WAY)
    average = PerParameter(
        "average",
        "average",
        begin=_zeros,
        needed=lambda opt, group: group.get(f"{opt.prefix}_average_steps"),
        way=_WAY,
    )
    # Steps of `segment`, of each of `pending`, and of `average`; lists are replaced, never changed
    segment_steps = RunValue(0)
    pending_steps = RunValue[list[int]]([])
    losses = RunValue[list[float]]([])  # at the end of each pending segment
    average_steps = RunValue(0)
    threshold = RunValue[float | None](None)  # of a valley
    early = RunValue(0)
    finished = RunValue(False)  # whether the valley has ended: the average changes no more

    @property
    def started(self) -> bool:
        """Whether a valley was found."""
        return self.threshold is not None

    @abstractmethod
    def _segments(self) -> Segments:
        """Return the segments of the average."""

    # -- the averages --

    def loss_of_ranks(self, name: str, value: Any) -> float:
        """Average a number over the ranks.

        Raises:
            TypeError, ValueError: it is not a finite number, on this rank or another.
        """
        try:
            own = finite(name, value)
        except (TypeError, ValueError):
            self._ranks.mean(math.nan)  # the others wait for this rank
            raise
        return finite(f"{name}: on some rank", self._ranks.mean(own))

    @torch.no_grad()
    def averaged(self) -> AveragedModel:
        """Copy the model with the averaged weights, for `torch.optim.swa_utils.update_bn`.

        Raises:
            RuntimeError: no step was made yet.
        """
        weights, count = self._segments().mean()
        copied = AveragedModel(self.model)
        copied.n_averaged.fill_(count)
        pairs = zip(copied.module.parameters(), self.model.parameters(), strict=True)
        for own, p in pairs:
            if p in weights:
                own.copy_(weights[p])
        return copied

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the model's weights by the averaged ones.

        Raises:
            RuntimeError: no step was made yet.
        """
        reshard(self.model)
        for p, weight in self._segments().mean()[0].items():
            p.copy_(weight)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Yield the model with the averaged weights; restore its own weights and buffers after.

        Raises:
            RuntimeError: no step was made yet.
        """
        reshard(self.model)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        self.apply()
        self._shown = True
        try:
            yield self.model
        finally:
            self._shown = False
            reshard(self.model)
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)

    # -- training --

    def _evaluate(self, closure: Closure) -> Tensor:
        """Run a closure for a plain optimizer, and `backward` if it returned losses."""
        result = closure()
        if not isinstance(result, tuple):
            return result
        losses, domains, inputs = check_result(result)
        return self.backward(losses, domains, **inputs)

    def _step(self, closure: Closure | None) -> Tensor | None:
        """Step the optimizer inside, and add the new weights to the average."""
        if self._shown:
            raise RuntimeError(
                "SWAD.step: the model has the averaged weights inside `applied`. Call step outside."
            )
        probe = closure is None and errors.is_probe(self.base)
        if self.inner is None:
            if self._micro_batches:
                raise errors.no_backward(type(self).__name__, staged=True)
            amp.refuse_scaled(self)
            closure = None if closure is None else partial(self._evaluate, closure)
        moves = not probe or is_new(innermost(self.base))
        loss = self._step_base(closure) if moves else None
        self._release_grad()
        if probe:
            begin(self, [p for p in self._names if p.grad is not None])
        else:
            self._commit()
        return loss

    @not_compiled
    def _commit(self) -> None:
        self._count()
        self.steps += 1
        if not self.finished:
            kept = self.segment
            for alike in self._alike():
                kept.update(
                    {p: to_statistics_dtype(p.detach()).clone() for p in alike if p not in kept}
                )
                averages = [kept[p] for p in alike]
                now = [p.detach().to(a.dtype) for p, a in zip(alike, averages, strict=True)]
                _average(averages, now, self.segment_steps)  # at step 0 this is a copy
            self.segment_steps += 1
        for name, tensors in self._own_state.items():
            for p, tensor in tensors.items():
                if p.grad is not None:  # the wrapped optimizer has created its own state by now
                    self.state[p][f"{self.prefix}_{name}"] = tensor

    def _alike(self) -> list[list[Tensor]]:
        """Group the averaged parameters by device and dtype."""
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in self.model.parameters():
            if p in self._names:
                groups.setdefault((p.device, p.dtype), []).append(p)
        return list(groups.values())

    def _clear(self) -> None:
        super()._clear()
        self._shown = False
