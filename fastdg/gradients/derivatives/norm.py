"""A norm's input gradient in a differentiable backward, as one operation.

There PyTorch writes the backward of a norm, or its derivative, out in dozens of operations of the
input's size. Here the norm's node runs with grad mode off, in one operation, and its result gets a
derivative, which is also that of the per-sample gradients of weight and bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.dispatch.derivatives import call
from ...ops.norm_gradients import differentiable_outputs, dtype_of
from ..rules.norm import Affine, NormRows, norm_of
from ..rules.registry import BoundRule
from .base import Gradients, OwnDerivative


class NormBackward(OwnDerivative):
    """Hooks that give one norm's input gradient its derivative.

    Args:
        node: the norm.
        rules: rules of its weight and bias that the backward serves.
        made: gets the per-sample gradients that these rules share.
    """

    def __init__(self, node: Any, rules: Iterable[BoundRule], made: dict[str, Any]) -> None:
        super().__init__(node)
        self.made = made
        # Layouts of kind "any" leave out rows without a gradient, whose derivative is not zero
        found = [r.norm for r in rules if isinstance(r, Affine) and r.layout.kind != "any"]
        self.norm = found[0] if found else norm_of(node)
        self.tracked = bool(found)

    def serves(self) -> bool:
        return self.norm is not None and super().serves()

    def operands(self) -> Sequence[Tensor | None]:
        return (self.node._saved_input, self.node._saved_weight)

    def derived(self, found: Sequence[Tensor | None], delta: Tensor) -> Gradients:
        node, norm = self.node, self.norm
        assert norm is not None
        operands = norm.operands(node, norm.saved(node), delta)
        gain = None if (weight := node._saved_weight) is None else weight.flatten()
        of_input, of_parameters = found[0], found[1:]  # parameters': where their sum is asked for
        both = self.tracked or any(grad is not None for grad in of_parameters)
        of_input, *rows = _Derivative.apply(
            (of_input, norm, both, operands["own"], operands["eps"]),
            *(operands[name] for name in ("x", "delta", "mean", "rstd")),
            gain,
        )
        if self.tracked:
            self.made["both"] = rows
        return of_input, *(
            None if grad is None else rows[k].sum(0).reshape(grad.shape).to(grad.dtype)
            for k, grad in enumerate(of_parameters)
        )


class _Derivative(torch.autograd.Function):
    """A norm's input gradient, which is known, and the rows of its weight's and bias's."""

    @staticmethod
    def forward(
        ctx: Any,
        known: tuple[Tensor | None, NormRows, bool, bool, float | None],
        x: Tensor,
        delta: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        gain: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        of_input, ctx.norm, both, ctx.own, ctx.eps = known
        ctx.save_for_backward(x, delta, mean, rstd, gain)
        ctx.set_materialize_grads(False)
        if not both:
            return (of_input,)
        return of_input, *ops.norm_gradients(x, delta, mean, rstd, own=ctx.own, eps=ctx.eps)

    @staticmethod
    def backward(ctx: Any, of_input: Tensor | None, *rows: Tensor | None) -> tuple[Any, ...]:
        x, delta, mean, rstd, gain = ctx.saved_tensors
        up = None if of_input is None else ctx.norm.rows(of_input)
        if torch.is_grad_enabled():
            return _by_autograd(ctx, [up, *rows])
        shape, dtype = (x.shape[0], x.shape[2]), dtype_of(x, delta)
        of_rows = [x.new_zeros(shape, dtype=dtype) if r is None else r for r in rows or (None,) * 2]
        of_x, of_delta, of_gain = call(
            "norm_gradients_backward",
            *of_rows, x, delta, mean, rstd, ctx.own, ctx.eps, gain, up,
        )  # fmt: skip
        of_gain = None if gain is None else of_gain.sum(0).to(gain.dtype)
        return None, of_x, of_delta, None, None, of_gain


def _by_autograd(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return `_Derivative.backward` with a graph."""
    x, delta, mean, rstd, gain = ctx.saved_tensors
    # Views: a gradient by x itself would also pass through a delta that depends on x
    x, delta = x.view_as(x), delta.view_as(delta)
    gain = gain if gain is None else gain.view_as(gain)
    inputs = x, delta, gain
    outputs = differentiable_outputs(x, delta, mean, rstd, ctx.own, ctx.eps, gain)
    asked = [
        (out, up)
        for out, up in zip(outputs, grads, strict=False)
        if up is not None and out.requires_grad
    ]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in asked],
        wanted,
        [up.to(out.dtype) for out, up in asked],
        create_graph=True,
        allow_unused=True,
    )
    of = {id(t): grad for t, grad in zip(wanted, found, strict=True)}
    of_x, of_delta, of_gain = (of.get(id(t)) for t in inputs)
    return None, of_x, of_delta, None, None, of_gain
