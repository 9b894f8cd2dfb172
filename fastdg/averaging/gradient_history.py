"""Gradients with their variances, over time or in a batch, that decide a step's direction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._torch import not_compiled
from ..core.backward import put
from ..core.combine.seeded import Seeded
from ..core.declared_state import PerParameter
from ..core.hyper import check_one_of, option
from ..core.step_batch import StepRecord
from ..distributed.sharding import refuse_sharded
from ..domains import to_device_async
from ..dtypes import to_statistics_dtype


class Estimate(NamedTuple):
    """A gradient, and how sure it is.

    Attributes:
        mean: the gradient, of the parameter's shape.
        variance: of what it averages.
        share: of the variance that the mean has, 0-dim.
    """

    mean: Tensor
    variance: Tensor
    share: Tensor


class _Number(PerParameter):
    """A number for each parameter, whatever its shape."""

    def fits(self, p: Tensor, tensor: Tensor) -> bool:
        return tensor.dim() == 0


def _zeros(opt: GradientHistory) -> dict[Tensor, Tensor]:
    return {p: torch.zeros_like(to_statistics_dtype(p.detach())) for p in opt._names}


def _over_time(opt: GradientHistory, group: object) -> bool:
    return opt.variance == "history"


class GradientHistory(Seeded):
    """Base of wrappers that step along a function of the gradient and its variance.

    ``.grad`` is the direction during the step, and the gradient again after it.
    """

    penalises = False
    params = "all"
    _reads_grad = True
    _transient = (*Seeded._transient, "_gradients", "_entering")

    decay: float  # of the averages
    variance: Literal["history", "batch"] = option("history", check_one_of("history", "batch"))

    mean = PerParameter("mean", "averages of gradients", begin=_zeros, needed=_over_time)
    square = PerParameter("square", "averages of squares", begin=_zeros, needed=_over_time)
    # Sum of the weights of all gradients in the averages, the newest with 1
    scale = _Number(
        "scale",
        "scales of the averages",
        begin=lambda opt: {p: p.new_zeros((), dtype=torch.float64) for p in opt._names},
        needed=_over_time,
    )

    @abstractmethod
    def estimate(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Estimate | None:
        """Judge the gradient of a parameter in a group of the optimizer; None: the step goes along
        the gradient."""

    @abstractmethod
    def direction(self, found: Estimate, normal: Tensor, uniform: Tensor) -> Tensor:
        """Return the direction of the step, given random numbers of its shape."""

    @property
    def looks_at_samples(self) -> bool:  # type: ignore[override]
        return self.variance == "batch"

    def _clear(self) -> None:
        super()._clear()
        self._gradients: dict[Tensor, Tensor] = {}  # .grad before the step
        self._entering: dict[Tensor, Tensor] = {}  # gradients that join the averages after it

    @not_compiled
    @torch.no_grad()
    def _prepare(self) -> None:
        super()._prepare()
        gradients = {p: p.grad for p in self._names if p.grad is not None}
        if not gradients:
            return
        for p in gradients:
            refuse_sharded(p, type(self).__name__, "whose entries it weighs together")
        self._gradients = gradients
        self._drawn_before = self._generator_state()
        device = next(iter(self._gradients)).device
        device = device if self.generator is None else self.generator.device
        generator = self.generator_on(device)
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p, grad in self._gradients.items():
            dense = to_statistics_dtype(grad.to_dense() if grad.is_sparse else grad)
            found = self.estimate(p, dense, groups[p])
            if found is None:
                continue
            drawn = [
                to_device_async(
                    draw(p.shape, generator=generator, dtype=dense.dtype, device=device), p.device
                )
                for draw in (torch.randn, torch.rand)
            ]
            put({p: self.direction(found, *drawn).to(p.dtype)})
        self._remember()

    def _undo(self) -> None:
        super()._undo()
        self._put_back()
        self._entering = {}

    def _finish_load(self) -> None:
        super()._finish_load()
        if self.variance == "batch":  # averages of another run's steps would stay as they are
            for averages in (self.mean, self.square, self.scale):
                averages.clear()

    @not_compiled
    @torch.no_grad()
    def _commit(self) -> None:
        self._put_back()
        for p, gradient in self._entering.items():
            averages = self._averages(p, gradient)
            # Again: kept from `over_time`, they would be a copy of all averages during the step
            joined(averages, gradient, self.decay, averages)
            self.mean[p], self.square[p], self.scale[p] = averages
        self._entering = {}
        super()._commit()

    def _put_back(self) -> None:
        """Let ``.grad`` be the gradient."""
        put(self._gradients)
        self._gradients = {}

    def _averages(self, p: Tensor, gradient: Tensor) -> list[Tensor]:
        """Return a parameter's averages of gradients and squares, and their scale."""
        if p in self.mean:
            return [self.mean[p], self.square[p], self.scale[p]]
        scale = torch.zeros((), dtype=torch.float64, device=p.device)
        return [torch.zeros_like(gradient), torch.zeros_like(gradient), scale]

    def over_time(self, p: Tensor, gradient: Tensor) -> Estimate:
        """Return the variance of the gradients in the averages and of this one, which joins them
        after the step."""
        self._entering[p] = gradient
        averages, decay = self._averages(p, gradient), self.decay
        made = [torch.empty_like(average) for average in averages]
        mean, square, scale = joined(averages, gradient, decay, made)
        weight = (1 - decay) * scale
        share = ((1 - decay) * (2 - weight) / ((1 + decay) * weight)).to(gradient.dtype)
        weight = weight.to(gradient.dtype)
        mean.div_(weight)
        variance = square.div_(weight).sub_(mean.square()).div_(1 - share)
        # One gradient has no variance
        return Estimate(mean, variance.where(scale > 1, 0.0), share)

    def of_batch(self, p: Tensor, gradient: Tensor) -> Estimate | None:
        """Return the variance of the samples' gradients; None for what only a term reaches."""
        record: StepRecord = self._pending
        if (name := self._names[p]) not in record.variance:
            return None
        means, count = record.mean[name], record.counts.to(gradient.dtype)
        rows = (len(count), *(1 for _ in p.shape))
        shares = (count / count.sum()).view(rows)
        apart = (means - (shares * means).sum(0)).square()
        variance = (shares * (record.variance[name] + apart)).sum(0)
        samples = count.sum()
        unbiased = variance * samples / (samples - 1).clamp(min=1)
        return Estimate(gradient, unbiased.to(gradient.dtype), 1 / samples)


def joined(
    averages: Sequence[Tensor], gradient: Tensor, decay: float, into: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Write averages with another gradient in them into tensors, which may be the same."""
    for average, value, place in zip(averages, (gradient, gradient.square()), into, strict=False):
        torch.mul(average, decay, out=place).add_(value, alpha=1 - decay)
    torch.mul(averages[2], decay, out=into[2]).add_(1)
    return into
