"""Steps with the gradient at other weights than the model's: sharpness-aware minimization."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp import GradScaler

from .._torch import not_compiled
from ..core import amp
from ..core.backward import poison_if_nonfinite, put
from ..core.closures import Forward
from ..core.hyper import check_one_of, fixed, hyper
from ..core.nesting import chain
from ..core.optimizer import DomainOptimizer
from ..core.rerun import Buffers
from ..distributed.sharding import like_parameter, local
from .outer import OuterOptimizer
from .vector import Vector

Offsets = Generator[Vector, Vector, Vector]


@dataclass
class Visit:
    """The visits to other weights of one step.

    Attributes:
        offsets: the algorithm's generator, which waits for the next gradient.
        weights: parameter -> weights of the model.
        buffers: buffers of the modules that run.
        statistics: statistics of the gradient at the model's weights.
        norm: norm of this gradient.
        scaler: GradScaler of this gradient.
        gradients: number of gradients so far.
    """

    offsets: Offsets
    weights: dict[Tensor, Tensor]
    buffers: Buffers
    statistics: dict[str, Tensor]
    norm: Tensor
    scaler: GradScaler | None
    gradients: int = 1


class Ascent(OuterOptimizer):
    """Base of wrappers whose step combines gradients at several weights.

    A step is ``opt.step(closure)``, which calls the closure ``points`` times. Or it is as many
    calls of `backward` with `ascend` between two of them, and then `step`. The last `backward`
    puts the model's weights back, bit for bit.

    An algorithm implements `offsets`.
    """

    role = "ascent"
    points = 2  # gradients of a step
    _transient = (*OuterOptimizer._transient, "_visit", "_complete")
    _visit: Visit | None = fixed(None, init=False)
    _complete = False  # whether .grad holds the gradient of the step

    buffers: Literal["first", "all"] = hyper("first", check_one_of("first", "all"))

    @property
    def inner(self) -> DomainOptimizer | None:
        """The algorithm inside, which makes the gradients. Terms are added by this wrapper."""
        inner = super().inner
        return None if inner is None or inner.role == "term" else inner

    @property
    def _made(self) -> int:
        """Number of gradients of this step, at the weights before the present ones."""
        return 0 if self._visit is None else self._visit.gradients

    @abstractmethod
    def offsets(self, gradient: Vector) -> Offsets:
        """Yield offsets from the model's weights, receive the gradient there, and return the
        gradient of the step.

        Args:
            gradient: gradient at the model's weights.
        """

    def backward(
        self,
        losses: Tensor | Sequence[Tensor],
        domains: Tensor | int | None = None,
        final: bool = True,
        *,
        scaler: GradScaler | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Call `backward` of the algorithm inside, or of `ERM`, at the weights the model has now;
        see there.

        Raises:
            RuntimeError: the gradient of the step is complete; ``scaler`` is not the one of the
                first backward.
        """
        name, visit = type(self).__name__, self._visit
        if self._complete and self._grad_is_owned():
            raise RuntimeError(
                f"losses: the {self.points} gradients of this {name} step are complete, and the "
                "model has its own weights again. Call opt.step() first. To accumulate, pass "
                "final=False to all but the last backward at each point."
            )
        if visit is not None and (visit.scaler is not scaler) and _enabled(scaler, visit.scaler):
            raise RuntimeError(
                f"scaler: pass the same GradScaler to every {name}.backward of a step, or none."
            )
        self._complete = False
        try:
            loss = super().backward(losses, domains, final, scaler=scaler, **inputs)
        except RuntimeError as error:
            if visit is not None and "inplace" in str(error):
                raise RuntimeError(
                    "losses: they come from a forward before opt.ascend() has moved the weights. "
                    "Run the model again after opt.ascend()."
                ) from error
            raise
        if final:
            if self.inner is not None:
                self._loss_scale, self._statistics = self.inner._loss_scale, self.inner.statistics
            if visit is not None and visit.gradients == self.points - 1:
                self._finish(visit)
        return loss

    @not_compiled
    @torch.no_grad()
    def ascend(self) -> None:
        """Move the model to the weights at which the next gradient is taken, and clear ``.grad``.

        Call it between two calls of `backward`.

        Raises:
            RuntimeError: no final backward was called before it; or the gradients are complete.
        """
        name = type(self).__name__
        if self._complete and self._ready:
            raise RuntimeError(
                f"{name}.ascend(): the {self.points} gradients of this step are complete. Call "
                "opt.step()."
            )
        if not self._ready:
            raise RuntimeError(
                f"{name}.ascend(): needs a backward before it. Call opt.backward(losses, domains) "
                "with final=True first."
            )
        scaler = self._loss_scale.scaler
        if scaler is not None and amp.is_unscaled(scaler, self):
            raise RuntimeError(
                f"scaler: unscale_ was called before {name}.ascend(). The gradients of a step have "
                "one scale, so call it after the last backward. To go on, call opt.zero_grad(), "
                "scaler.update() and begin the step anew."
            )
        gradient = self._take_gradient()
        if self._visit is None:
            offsets = self.offsets(gradient)
            offset = next(offsets)
            self._visit = Visit(
                offsets,
                {},
                Buffers(),
                dict(self._statistics),
                gradient.norm(),
                scaler,
            )
            if self.buffers == "first":
                model = None if self._model is None else self._model()
                self._visit.buffers.record(model, self._names)
        else:
            offset = self._visit.offsets.send(gradient)
            self._visit.gradients += 1
        weights = self._visit.weights
        for p in offset.parts:
            if p not in weights:  # later forwards may use more parameters
                weights[p] = local(p).detach().clone()
        for p, weight in weights.items():
            if self._visit.gradients > 1:
                local(p).detach().copy_(weight)
            if p in offset.parts:
                local(p).detach().add_(offset.parts[p])

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its own weights again and forget the gradients of this step, after an
        error between two calls of `backward`."""
        visit, self._visit = self._visit, None
        if visit is None:
            return
        for p, weight in visit.weights.items():
            local(p).detach().copy_(weight)
        visit.buffers.restore()

    @torch.no_grad()
    def _finish(self, visit: Visit) -> None:
        """Put the weights back, and the gradient of the step into ``.grad``."""
        gradient = self._unscaled_gradient()
        self.restore()
        try:
            visit.offsets.send(gradient)
        except StopIteration as end:
            combined: Vector = end.value
        if (scale := self._loss_scale.scale) is not None:
            combined = combined * scale
        put({p: like_parameter(p, x) for p, x in combined.parts.items()})
        for link in chain(self):
            link._mark_grad_owned()
        self._complete = True
        if visit.scaler is not None:  # its step is skipped if only the first gradient overflowed
            poison_if_nonfinite(self.param_groups, [visit.norm])
        self._statistics = {
            **visit.statistics,
            "ascended_loss": self._statistics["loss"],
            "gradient_norm": visit.norm,
        }

    def _unscaled_gradient(self) -> Vector:
        parameters = [p for group in self.param_groups for p in group["params"]]
        grads = {p: local(p.grad) for p in parameters if p.grad is not None}
        gradient, scale = Vector(grads, self._ranks), self._loss_scale.scale
        return gradient if scale is None else gradient * (1 / scale)

    def _take_gradient(self) -> Vector:
        """Take the gradient out of ``.grad``. State that moves in `step` follows the last one."""
        gradient = self._unscaled_gradient()
        put(dict.fromkeys(gradient.parts))
        for link in chain(self):
            link._ready, link._owned_grad, link._pending = False, None, None
        return gradient

    # -- a step --

    def evaluate_closure(self, forward: Forward) -> Tensor:
        self.restore()
        try:
            loss = forward.backward()
            for _ in range(self.points - 1):
                self.ascend()
                forward.backward()
        except BaseException:
            self.restore()
            raise
        return loss

    def _step(self, closure: Any) -> Tensor | None:
        name = type(self).__name__
        if closure is None and (self._visit is not None or (self._ready and not self._complete)):
            raise RuntimeError(
                f"{name}.step(): needs {self.points} gradients, got {self._made or 1}. Call "
                "opt.ascend() and opt.backward(losses, domains) on a new forward first, or "
                "opt.step(closure)."
            )
        return super()._step(closure)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Statistics of the last final `backward`. After the last backward of a step: statistics
        of the first one, with ``ascended_loss`` (the mean loss of the last) and
        ``gradient_norm``, 0-dim."""
        return self._statistics

    def _release_grad(self) -> None:
        super()._release_grad()
        self._complete = False

    def _clear(self) -> None:
        super()._clear()
        self._visit = None

    def _refuse_visit(self) -> None:
        if self._visit is not None:
            raise RuntimeError(
                f"{type(self).__name__}: the model is not at its own weights. Save or copy between "
                "two steps; after an error call opt.restore() first."
            )

    def state_dict(self) -> dict[str, Any]:
        """See `DomainOptimizer.state_dict`; raises between `ascend` and the last `backward`."""
        self._refuse_visit()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_visit()
        return super().__getstate__()


def _enabled(*scalers: GradScaler | None) -> bool:
    """Whether one of the scalers scales."""
    return any(scaler is not None and scaler.is_enabled() for scaler in scalers)
