"""Averaged weights: a copy of the model with them, or the model itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..core.optimizer import DomainOptimizer
from ..distributed.sharding import reshard
from .averages import Segments


class Averaged(DomainOptimizer):
    """Base of wrappers that keep an average of the weights beside the model."""

    role = "average"
    looks_at_samples = False
    _network: nn.Module  # which goes with this wrapper wherever it is copied
    _shown: bool  # the model has the averaged weights for a while
    _transient = (*DomainOptimizer._transient, "_shown")

    @abstractmethod
    def _segments(self) -> Segments:
        """What the average is made of."""

    @torch.no_grad()
    def averaged(self) -> AveragedModel:
        """A copy of the model with the averaged weights, for `torch.optim.swa_utils.update_bn`.

        Raises:
            RuntimeError: no step was made yet.
        """
        weights, count = self._segments().mean()
        copied = AveragedModel(self._network)
        copied.n_averaged.fill_(count)
        pairs = zip(copied.module.parameters(), self._network.parameters(), strict=True)
        for own, p in pairs:
            if p in weights:
                own.copy_(weights[p])
        return copied

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averaged weights, for good.

        Raises:
            RuntimeError: no step was made yet.
        """
        reshard(self._network)
        for p, weight in self._segments().mean()[0].items():
            p.copy_(weight)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model, with the averaged weights inside the ``with`` block; its own weights and
        buffers come back after.

        Raises:
            RuntimeError: no step was made yet.
        """
        reshard(self._network)
        tensors = [*self._network.parameters(), *self._network.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        self.apply()
        self._shown = True
        try:
            yield self._network
        finally:
            self._shown = False
            reshard(self._network)
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)

    def _clear(self) -> None:
        super()._clear()
        self._shown = False
