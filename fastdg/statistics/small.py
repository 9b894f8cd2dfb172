"""Moments of many small parameters in one call: a call for each would take longer than its
computation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import ops
from ..domains import Partition
from ..factors import Dense, NormCall, OfNorm, Outer, PerSampleGrad
from ..factors.norm import compute

SMALL = 1 << 16  # entries of a factor's tensors, and of a parameter, that may wait for others
WAITING = 1 << 18  # entries of all factors that wait
# On a GPU a launch takes as long as some MB of memory: per-sample gradients of biases and norms
# wait there, and no product, whose kernel for many has no tensor cores.
SMALL_THERE, WAITING_THERE = 1 << 22, 1 << 24
# Bytes of the maps of norms that wait; of other layers, nearly as many are freed meanwhile
MAPS_THERE = 1 << 29

K = TypeVar("K", bound=Hashable)


class _Waiting(NamedTuple):
    """The factors of one dtype that wait, each with the key of its parameter."""

    grads: list[tuple[Any, Dense]]
    products: list[tuple[Any, Outer]]


class Small(Generic[K]):
    """Mean and variance by domain of small parameters' gradients, many in one call.

    Args:
        partition: of the samples.
        variance: whether to compute the variances, too.
    """

    def __init__(self, partition: Partition, *, variance: bool) -> None:
        self.partition, self.variance = partition, variance
        self.waiting: dict[torch.dtype, _Waiting] = {}
        self.entries = 0
        self.norms: dict[NormCall, None] = {}  # in their order
        self.held = 0  # bytes of their maps
        self.made: dict[K, tuple[Tensor, Tensor | None]] = {}

    def takes(self, key: K, factor: PerSampleGrad) -> bool:
        """Return whether these gradients are small; then `results` has their moments."""
        most, waits = SMALL, WAITING
        if type(factor) is Dense:
            size, dtype = factor.grads.numel(), factor.grads.dtype
            if not factor.grads.is_cpu:
                most, waits = SMALL_THERE, WAITING_THERE
        elif type(factor) is OfNorm:
            size, dtype = factor.entries, factor.call.dtype
            most, waits = SMALL_THERE, WAITING_THERE
        elif type(factor) is Outer and factor.groups == 1 and not factor.window:
            a, delta = factor.factors
            size, dtype = a.numel() + delta.numel(), a.dtype
            if a.shape[-1] * delta.shape[-1] > SMALL:
                return False
        else:
            return False
        if size > most:
            return False
        waiting = self.waiting.get(dtype)
        if waiting is None:
            waiting = self.waiting[dtype] = _Waiting([], [])
        if type(factor) is Outer:  # in half the time of isinstance, whose class is abstract
            waiting.products.append((key, factor))
        else:
            waiting.grads.append((key, factor))  # type: ignore[arg-type]
        if type(factor) is OfNorm:
            self._hold(factor.call)
        self.entries += size
        if self.entries > waits:
            self._flush()
        return True

    def _hold(self, call: NormCall) -> None:
        if call.made is not None or call in self.norms:
            return  # computed, or held by the norm's weight
        if self.norms and self.held + call.bytes > MAPS_THERE:
            self._compute()
        self.norms[call] = None
        self.held += call.bytes

    def _compute(self) -> None:
        compute(list(self.norms))
        self.norms, self.held = {}, 0

    def results(self) -> dict[K, tuple[Tensor, Tensor | None]]:
        """Return key -> mean and variance, each ``[D, *shape]``."""
        self._flush()
        return self.made

    def _flush(self) -> None:
        self.entries, domains = 0, self.partition.num_domains
        self._compute()
        for grads, products in self.waiting.values():
            pairs = [factor.factors for _, factor in products]
            with torch.no_grad():
                means, variances = ops.foreach_moments(
                    [factor.grads for _, factor in grads],
                    [a for a, _ in pairs],
                    [delta for _, delta in pairs],
                    self.partition.order,
                    self.partition.offsets,
                    self.variance,
                )
            spreads: Sequence[Tensor | None] = variances or [None] * len(means)
            found = zip(means, spreads, strict=True)
            self.made.update(zip([key for key, _ in (*grads, *products)], found, strict=True))
            for key, factor in products:
                mean, spread = self.made[key]
                shape = (domains, *factor.shape)
                if mean.shape != shape:  # of a convolution of one place, say
                    mean, spread = mean.view(shape), None if spread is None else spread.view(shape)
                    self.made[key] = mean, spread
        self.waiting = {}
