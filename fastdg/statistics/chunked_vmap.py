"""Per-sample gradients by `torch.func`, a chunk at a time: each is reduced at once, and computed
again for a backward.

``vmap(grad(loss))`` gives a chunk, the chunk is reduced, and the next one takes its place. The
graph keeps the parameters and the batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import functorch_active
from .problem import Problem
from .random_state import random_state, replay, restore
from .reductions import Reduction


def run(
    kind: type[Reduction],
    problem: Problem,
    state: list[Tensor],
    num_domains: int,
    domains: Tensor,
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """Reduce the chunks one after the other."""
    reduction = kind(problem, domains, num_domains)
    for chunk in problem.chunks():
        if problem.randomness == "same":
            restore(state, tensors[0].device)
        cut = problem.cut(tensors, slice(*chunk))
        reduction.add(chunk, reduction.part(chunk, problem.gradients(*cut)))
    return tuple(reduction.result())


class Streamed(torch.autograd.Function):
    """The result of `run`, with a backward that holds one chunk at a time.

    `torch.utils.checkpoint` does not go through `torch.func`. The result comes from outside, where
    a compiler lets ``loss`` swap the parameters of a module.
    """

    @staticmethod
    def forward(
        kind: type[Reduction],
        problem: Problem,
        state: list[Tensor],
        num_domains: int,
        result: tuple[Tensor, ...],
        domains: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kind, ctx.problem, ctx.state, ctx.num_domains, _, domains, *tensors = inputs
        ctx.results = len(output)
        ctx.save_for_backward(domains, *output, *tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        domains, *saved = ctx.saved_tensors
        result, tensors = saved[: ctx.results], _late(saved[ctx.results :], upstream)
        problem: Problem = ctx.problem
        reduction: Reduction = ctx.kind(problem, domains, ctx.num_domains)
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[6:]) if need]
        total: dict[int, Tensor] = {}
        rows: dict[int, list[Tensor]] = {i: [] for i in wanted if i >= len(problem.names)}
        device = tensors[0].device
        with replay(ctx.state, device):
            for chunk in problem.chunks():
                if problem.randomness == "same":
                    restore(ctx.state, device)
                cut = problem.cut(tensors, slice(*chunk))
                before = random_state(problem.randomness, device)
                inner = reduction.pull(chunk, problem.gradients(*cut), result, upstream)
                if before:
                    restore(before, device)
                pulled = problem.pull(cut, wanted, inner)
                for i, g in zip(wanted, pulled, strict=True):
                    if i in rows:
                        rows[i].append(g)
                    else:
                        total[i] = total[i] + g if i in total else g
        total.update({i: torch.cat(parts) for i, parts in rows.items()})
        return (*[None] * 6, *(total.get(i) for i in range(len(tensors))))


def _late(tensors: list[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Return ``tensors`` so that a compiler cannot use them before ``upstream``.

    It would find that the backward computes the forward's chunks over again, and keep them all.
    """
    if not torch.compiler.is_compiling():
        return tensors
    either = upstream[0].reshape(-1)[:1].sum().isnan()
    return [torch.where(either, x, x) for x in tensors]


def stream(
    kind: type[Reduction],
    problem: Problem,
    tensors: Sequence[Tensor],
    domains: Tensor,
    num_domains: int,
) -> tuple[Tensor, ...]:
    """Reduce the per-sample gradients of ``tensors``, differentiably with respect to them."""
    recorded = functorch_active() or (
        torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    )
    if torch.is_grad_enabled():
        problem.refuse_captured(tensors)
    state = random_state(problem.randomness, tensors[0].device)
    with torch.no_grad():
        result = run(kind, problem, state, num_domains, domains, *tensors)
    if not recorded:
        return result
    return Streamed.apply(kind, problem, state, num_domains, result, domains, *tensors)
