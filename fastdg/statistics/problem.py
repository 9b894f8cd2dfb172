"""The per-sample gradients of a function of parameters and one sample, by `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import pytree
from ..dtypes import to_statistics_dtype
from .random_state import Randomness, random_state, replay

Loss = Callable[..., Tensor]


class Chunk(NamedTuple):
    """Samples ``start`` to ``stop - 1`` of the batch."""

    start: int
    stop: int


@dataclass(frozen=True)
class Problem:
    """A function whose per-sample gradients are taken; its tensors are passed beside it, first the
    parameters, then the batch.

    Attributes:
        loss: ``loss(params, *sample)``, one sample's loss.
        names: one for each tensor of ``params``.
        params_spec, batch_spec: how the tensors make up ``params`` and the batch.
        samples: N.
        chunk_size: samples whose gradients exist at the same time.
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
        """Return ``tensors`` with only ``rows`` of the batch."""
        split = len(self.names)
        return [*tensors[:split], *(t[rows] for t in tensors[split:])]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """Return ``tensors`` as the user passed them: ``params`` and the batch."""
        split = len(self.names)
        params = pytree.tree_unflatten(list(tensors[:split]), self.params_spec)
        return params, pytree.tree_unflatten(list(tensors[split:]), self.batch_spec)

    def gradients(self, *tensors: Tensor) -> list[Tensor]:
        """Return per-sample gradients ``[n, *shape]`` in the dtype of statistics."""
        params, batch = self.arguments(tensors)
        dims = (None, *[0] * len(batch))
        gradient = torch.func.vmap(torch.func.grad(self.scalar), dims, randomness=self.randomness)
        return [to_statistics_dtype(g) for g in pytree.tree_leaves(gradient(params, *batch))]

    def pull(
        self, tensors: Sequence[Tensor], wanted: Sequence[int], upstream: list[Tensor]
    ) -> list[Tensor]:
        """Pull ``upstream``, the gradients of `gradients`, back to the ``wanted`` tensors.

        Sample by sample under one vmap. The derivatives are taken inside it, since vmap's form of
        an operation may have a wrong one: it treats mean and spread of a layer norm as constants.
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
        """Return one sample's loss, checked."""
        value = self.loss(params, *sample)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"loss: expected a 0-dim tensor, got {type(value).__name__}. Return one sample's "
                "loss."
            )
        if value.dim() != 0:
            raise ValueError(
                f"loss: expected one sample's loss, a 0-dim tensor, got shape {tuple(value.shape)}."
                " Write it as loss(params, *sample), without the sample dimension."
            )
        if not value.is_floating_point():
            raise TypeError(
                f"loss: expected a floating dtype, got {value.dtype}. Return one sample's loss."
            )
        return value

    def refuse_captured(self, tensors: Sequence[Tensor]) -> None:
        """Raise if ``loss`` closes over a tensor that a backward would miss."""
        params, sample = self.arguments(self.cut([t.detach() for t in tensors], 0))
        device = tensors[0].device
        with replay(random_state(self.randomness, device), device):
            captured = self.scalar(params, *sample).requires_grad
        if captured:
            raise ValueError(
                "loss: expected all tensors that require a gradient in params or in the batch, got "
                "one outside of them, which a backward would not reach. Pass it in one of them, "
                "detach() it if it is a constant, or call under torch.no_grad() if you need only "
                "values."
            )
