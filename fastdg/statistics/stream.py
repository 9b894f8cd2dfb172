"""Per-sample gradients by `torch.func`, a chunk at a time: reduced as they come, and made again for
a backward.

``vmap(grad(loss))`` gives a chunk, the chunk is reduced, and the next one takes its place. The
graph keeps the parameters and the batch alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._torch import functorch_active, pytree
from ..domains import Partition, partition
from ..dtypes import to_statistics_dtype
from ..factors import flat
from ..ops.dispatch.derivatives import call
from .moments import DomainMoments, merge

Loss = Callable[..., Tensor]
Randomness = Literal["error", "different", "same"]


class Chunk(NamedTuple):
    """Samples ``start`` to ``stop - 1`` of the batch."""

    start: int
    stop: int


@dataclass(frozen=True)
class Problem:
    """What is asked for, except its tensors: those of ``params``, then those of the batch.

    Attributes:
        loss: ``loss(params, *sample)``, one sample's loss.
        names: one for each tensor of ``params``.
        params_spec, batch_spec: how the tensors make up ``params`` and the batch.
        samples: N.
        chunk_size: samples of which gradients exist at a time.
        randomness: as in `torch.func.vmap`.
    """

    loss: Loss
    names: tuple[str, ...]
    params_spec: pytree.TreeSpec
    batch_spec: pytree.TreeSpec
    samples: int
    chunk_size: int
    randomness: Randomness

    def chunks(self) -> list[Chunk]:
        starts = range(0, self.samples, self.chunk_size)
        return [Chunk(start, min(start + self.chunk_size, self.samples)) for start in starts]

    def cut(self, tensors: Sequence[Tensor], rows: slice | int) -> list[Tensor]:
        """``tensors`` with only ``rows`` of the batch."""
        split = len(self.names)
        return [*tensors[:split], *(t[rows] for t in tensors[split:])]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """``tensors`` as the user gave them: ``params`` and the batch."""
        split = len(self.names)
        params = pytree.tree_unflatten(list(tensors[:split]), self.params_spec)
        return params, pytree.tree_unflatten(list(tensors[split:]), self.batch_spec)

    def gradients(self, *tensors: Tensor) -> list[Tensor]:
        """Per-sample gradients ``[n, *shape]`` in the dtype of statistics; the batch is cut."""
        params, batch = self.arguments(tensors)
        dims = (None, *[0] * len(batch))
        gradient = torch.func.vmap(torch.func.grad(self.scalar), dims, randomness=self.randomness)
        return [to_statistics_dtype(g) for g in pytree.tree_leaves(gradient(params, *batch))]

    def pull(
        self, tensors: Sequence[Tensor], wanted: Sequence[int], upstream: list[Tensor]
    ) -> list[Tensor]:
        """From ``upstream``, the gradients of `gradients`, those of the ``wanted`` tensors.

        Sample by sample under one vmap: not all that vmap makes of an operation has the right
        derivative (it takes mean and spread of a layer norm for constants), but its outside is not
        differentiated here.
        """
        split = len(self.names)

        def one(upstream: list[Tensor], *sample: Tensor) -> tuple[Tensor, ...]:
            def gradient(*changed: Tensor) -> list[Tensor]:
                given = list(sample)
                for i, tensor in zip(wanted, changed, strict=True):
                    given[i] = tensor
                params, row = self.arguments(given)
                grads = torch.func.grad(self.scalar)(params, *row)
                return [to_statistics_dtype(g) for g in pytree.tree_leaves(grads)]

            pullback = torch.func.vjp(gradient, *(sample[i] for i in wanted))[1]
            return pullback(upstream)

        dims = (0, *[None] * split, *[0] * (len(tensors) - split))
        pulled = torch.func.vmap(one, dims, randomness=self.randomness)(upstream, *tensors)
        return [g.sum(0) if i < split else g for i, g in zip(wanted, pulled, strict=True)]

    def scalar(self, params: Any, *sample: Any) -> Tensor:
        """One sample's loss, checked."""
        value = self.loss(params, *sample)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss: expected a 0-dim tensor, got {type(value).__name__}")
        if value.dim() != 0:
            raise ValueError(
                f"loss: expected one sample's loss, a 0-dim tensor, got shape {tuple(value.shape)};"
                " it is called as loss(params, *sample), without the sample dimension"
            )
        if not value.is_floating_point():
            raise TypeError(f"loss: expected a floating dtype, got {value.dtype}")
        return value

    def refuse_captured(self, tensors: Sequence[Tensor]) -> None:
        """A backward reaches what was given, not what ``loss`` closes over."""
        params, sample = self.arguments(self.cut([t.detach() for t in tensors], 0))
        device = tensors[0].device
        with replay(random_state(self.randomness, device), device):
            captured = self.scalar(params, *sample).requires_grad
        if captured:
            raise ValueError(
                "loss: it uses a tensor that requires a gradient and is neither in params nor in "
                "the batch, so a backward would not reach it. Pass it in one of them, detach() it "
                "if it is a constant, or call under torch.no_grad() if only values are wanted"
            )


class Reduction(ABC):
    """What becomes of the chunks."""

    def __init__(self, problem: Problem, domains: Tensor, num_domains: int) -> None:
        self.problem, self.domains, self.num_domains = problem, domains, num_domains

    @abstractmethod
    def part(self, chunk: Chunk, grads: list[Tensor]) -> list[Tensor]:
        """What is left of a chunk of per-sample gradients."""

    @abstractmethod
    def add(self, chunk: Chunk, part: list[Tensor]) -> None:
        """Take in the `part` of a chunk."""

    @abstractmethod
    def result(self) -> list[Tensor]:
        """The statistic of all chunks."""

    @abstractmethod
    def pull(
        self, chunk: Chunk, grads: list[Tensor], result: list[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        """From ``upstream``, the gradients of `result`, those of a chunk's ``grads``."""


class Moments(Reduction):
    """Means, then variances, by domain: those of each chunk, merged."""

    merged: DomainMoments | None = None

    def part(self, chunk: Chunk, grads: list[Tensor]) -> list[Tensor]:
        parts = self._partition(chunk, grads[0])
        pairs = [ops.moments(flat(g), parts.order, parts.offsets) for g in grads]
        shapes = [(self.num_domains, *g.shape[1:]) for g in grads]
        return [
            pair[k].view(shape) for k in (0, 1) for pair, shape in zip(pairs, shapes, strict=True)
        ]

    def add(self, chunk: Chunk, part: list[Tensor]) -> None:
        names = self.problem.names
        moments = DomainMoments(
            dict(zip(names, part[: len(names)], strict=True)),
            dict(zip(names, part[len(names) :], strict=True)),
            self._partition(chunk, part[0]).count,
        )
        self.merged = moments if self.merged is None else merge([self.merged, moments])

    def result(self) -> list[Tensor]:
        assert self.merged is not None
        return [*self.merged.mean.values(), *self.merged.variance.values()]

    def pull(
        self, chunk: Chunk, grads: list[Tensor], result: list[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        parts, P = self._partition(chunk, grads[0]), len(grads)
        ones = torch.ones_like(self.domains)
        total = torch.zeros_like(parts.count).index_add(0, self.domains, ones).clamp(min=1)
        pulled = []
        for g, mean, up_mean, up_variance in zip(
            grads, result[:P], upstream[:P], upstream[P:], strict=True
        ):
            # The op divides by the samples in the chunk; the moments are those of all chunks.
            share = (parts.count.to(g.dtype) / total).unsqueeze(1)
            back = call(
                "moments_backward",
                flat(up_mean) * share,
                flat(up_variance) * share,
                flat(g),
                flat(mean),
                parts.order,
                parts.offsets,
            )
            pulled.append(back.view(g.shape))
        return pulled

    def _partition(self, chunk: Chunk, like: Tensor) -> Partition:
        ids = self.domains[slice(*chunk)]
        return partition(ids, like.new_empty(ids.shape), self.num_domains)


class Samples(Reduction):
    """The per-sample gradients themselves."""

    out: list[Tensor] | None = None

    def part(self, chunk: Chunk, grads: list[Tensor]) -> list[Tensor]:
        return grads

    def add(self, chunk: Chunk, part: list[Tensor]) -> None:
        if self.out is None:
            self.out = [g.new_empty((self.problem.samples, *g.shape[1:])) for g in part]
        for out, g in zip(self.out, part, strict=True):
            out[slice(*chunk)] = g

    def result(self) -> list[Tensor]:
        assert self.out is not None
        return self.out

    def pull(
        self, chunk: Chunk, grads: list[Tensor], result: list[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        return [up[slice(*chunk)] for up in upstream]


class Norms(Reduction):
    """The norm of each sample's gradient over all parameters."""

    out: Tensor | None = None

    def part(self, chunk: Chunk, grads: list[Tensor]) -> list[Tensor]:
        return [torch.stack([flat(g).norm(dim=1) for g in grads]).norm(dim=0)]

    def add(self, chunk: Chunk, part: list[Tensor]) -> None:
        self.out = part[0] if self.out is None else torch.cat([self.out, part[0]])

    def result(self) -> list[Tensor]:
        assert self.out is not None
        return [self.out]

    def pull(
        self, chunk: Chunk, grads: list[Tensor], result: list[Tensor], upstream: Sequence[Tensor]
    ) -> list[Tensor]:
        norm, up = result[0][slice(*chunk)], upstream[0][slice(*chunk)]
        scale = torch.where(norm == 0, 0, up / norm)  # of the subgradients at zero: zero
        return [(flat(g) * scale.to(g.dtype).unsqueeze(1)).view(g.shape) for g in grads]


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
    """``tensors``, for a compiler not before ``upstream``.

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


def random_state(randomness: Randomness, device: torch.device) -> list[Tensor]:
    """State of the generators that ``loss`` may draw from; none where it must not."""
    if randomness == "error":
        return []
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def restore(state: Sequence[Tensor], device: torch.device) -> None:
    """Set the generators to a `random_state` of the same device."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def replay(state: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Draw again what was drawn from ``state`` on, and leave the generators as they are."""
    if not state:
        yield
        return
    with torch.random.fork_rng([device] if len(state) > 1 else []):
        restore(state, device)
        yield
