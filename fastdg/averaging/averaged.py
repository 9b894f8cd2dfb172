"""Averaged weights: a copy of the model with them, or the model itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from .._torch import not_compiled
from ..core import amp, errors
from ..core.base_optimizer import check_result
from ..core.base_state import is_new
from ..core.checkpoint import begin
from ..core.hyper import fixed
from ..core.nesting import innermost
from ..core.optimizer import Closure
from ..distributed.sharding import reshard
from ..dtypes import to_statistics_dtype
from ..outer.outer import OuterOptimizer

_average = get_swa_multi_avg_fn()
WAY = (
    "save with torch.save, or convert its files to one file with "
    "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
)


def zeros(opt: Averaged) -> dict[Tensor, Tensor]:
    """Begin averages of the parameters."""
    like = [p for parameters in opt._alike() for p in parameters]
    return {p: torch.zeros_like(to_statistics_dtype(p.detach())) for p in like}


class Averaged(OuterOptimizer):
    """Base of wrappers that keep an average of the weights beside the model.

    The class decides which steps join it.
    """

    role = "average"
    model: nn.Module
    check: bool = fixed(True, init=False)
    _shown = False  # whether the model has the averaged weights, inside `applied`
    _transient = (*OuterOptimizer._transient, "_shown")

    @abstractmethod
    def _mean(self) -> tuple[dict[Tensor, Tensor], int]:
        """Return the averaged weights, and their number of steps."""

    @abstractmethod
    def _add(self) -> None:
        """Add the weights after a step to the average."""

    def _put_buffers(self, model: nn.Module) -> None:
        """Give the averaged buffers, if there are any, to the model or a copy of it."""

    def _check(self, model: nn.Module) -> None:
        """Raise if the model or a copy of it is no longer like the averages."""

    # -- the averages --

    @torch.no_grad()
    def averaged(self) -> AveragedModel:
        """Copy the model with the averaged weights, for `torch.optim.swa_utils.update_bn`.

        Raises:
            RuntimeError: no step was made yet.
        """
        weights, count = self._mean()
        copied = AveragedModel(self.model)
        copied.n_averaged.fill_(count)
        pairs = zip(copied.module.parameters(), self.model.parameters(), strict=True)
        for own, p in pairs:
            if p in weights:
                own.copy_(weights[p])
        self._put_buffers(copied.module)
        return copied

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the model's weights by the averaged ones.

        Raises:
            RuntimeError: no step was made yet.
        """
        reshard(self.model)
        weights, _ = self._mean()
        self._put_buffers(self.model)  # or an error, before anything has changed
        for p, weight in weights.items():
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
        outer, self._shown = self._shown, True
        try:
            yield self.model
        finally:
            self._shown = outer
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
                f"{type(self).__name__}.step: the model has the averaged weights inside `applied`. "
                "Call step outside."
            )
        probe = closure is None and errors.is_probe(self.base)
        if self.inner is None:
            if self._micro_batches:
                raise errors.no_backward(type(self).__name__, staged=True)
            amp.refuse_scaled(self)
            closure = None if closure is None else partial(self._evaluate, closure)
        closure = None if closure is None else self._checked(closure)
        moves = not probe or is_new(innermost(self.base))
        if not probe:
            self._check(self.model)
            self._prepare()
        loss = self._step_base(closure) if moves else None
        self._release_grad()
        if probe:
            begin(self, [p for p in self._names if p.grad is not None])
        else:
            self._commit()
        return loss

    def _checked(self, closure: Closure) -> Closure:
        """Check what a closure's forward has left, before the optimizer steps."""

        @wraps(closure)  # a closure's parameters say how it is run
        def checked(*args: Any) -> Any:
            result = closure(*args)
            self._check(self.model)
            return result

        return checked

    @not_compiled
    def _commit(self) -> None:
        self._count()
        self.steps += 1
        self._add()
        for name, tensors in self._own_state.items():
            for p, tensor in tensors.items():
                if p.grad is not None:  # the wrapped optimizer has created its own state by now
                    self.state[p][f"{self.prefix}_{name}"] = tensor

    def _join(self, kept: dict[Tensor, Tensor], steps: int) -> None:
        """Add the weights to their mean over ``steps`` steps, in place."""
        for alike in self._alike():
            kept.update(
                {p: to_statistics_dtype(p.detach()).clone() for p in alike if p not in kept}
            )
            averages = [kept[p] for p in alike]
            now = [p.detach().to(a.dtype) for p, a in zip(alike, averages, strict=True)]
            _average(averages, now, steps)  # at step 0 this is a copy

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
