"""DomainBed's interface to fastdg's wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .._torch import BatchNorm, Dropout
from ..core.optimizer import DomainOptimizer
from .resume import Journal, Minibatches


class Adapter:
    """An algorithm as DomainBed's scripts expect it, mixed into one of DomainBed's classes.

    DomainBed's class creates the network and its optimizer, so both start and are saved as in
    DomainBed; `update` is fastdg's.
    """

    entry: Entry
    journal: Journal | None = None  # of the run, if it shall be resumable
    opt: DomainOptimizer | None = None

    network: nn.Module  # from DomainBed's class, as the next three
    optimizer: Optimizer
    hparams: Mapping[str, Any]
    state_dict: Callable[[], Mapping[str, Any]]
    load_state_dict: Callable[[Mapping[str, Any]], Any]

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        num_domains: int,
        hparams: Mapping[str, Any],
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)  # type: ignore[call-arg]
        self.num_domains = num_domains

    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
        """Make one step on a batch of each domain; return the values that DomainBed logs."""
        if self.journal is not None:
            return self.journal.update(self, minibatches)
        return self.train_step(minibatches)

    def wrapper(self) -> DomainOptimizer:
        """Return the wrapper around `optimizer`. It is made at its first use, since DomainBed makes
        the network before it moves it to its device."""
        if self.opt is None:
            self.opt = self.entry.wrap(self)
        return self.opt

    def train_step(self, minibatches: Minibatches) -> dict[str, float]:
        opt = self.wrapper()
        if self.entry.together or not (self.entry.alone or couples(self.network.modules())):
            x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
            sizes = torch.tensor([len(labels) for _, labels in minibatches])
            domains = torch.arange(len(sizes)).repeat_interleave(sizes)

            def closure() -> tuple[Tensor, Tensor, dict[str, Any]]:
                losses, inputs = self.losses(x, y)
                return losses, domains, inputs

            opt.zero_grad()
            opt.step(closure)
        elif self.entry.asks:
            opt.step(lambda d: self.losses(*minibatches[d])[0])
        else:
            opt.zero_grad()
            for d, (x, y) in enumerate(minibatches):
                losses, inputs = self.losses(x, y)
                final = d == len(minibatches) - 1
                opt.backward(losses, torch.full((len(y),), d), final=final, **inputs)
            opt.step()
        if (count := getattr(self, "update_count", None)) is not None:
            count += 1  # DomainBed's own, for readers of its checkpoints
        statistics = {**opt.statistics, "last": opt.statistics["domain_loss"][-1]}
        values = torch.stack([statistics[name].double() for name in self.entry.logs.values()])
        return dict(zip(self.entry.logs, values.tolist(), strict=True))

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return a loss for each sample ``[N]``, and further inputs of ``opt.backward``."""
        return F.cross_entropy(self.network(x), y, reduction="none"), {}


@dataclass(frozen=True)
class Entry:
    """The particulars of an algorithm.

    Attributes:
        parent: the class of DomainBed that makes network and optimizer.
        wrap: makes the wrapper, from an `Adapter`.
        logs: DomainBed's name of a value -> its name in ``opt.statistics``, or ``"last"``: the loss
            of the last domain.
        together: one forward of all domains, as in DomainBed. Else DomainBed makes one for each;
            where that gives the same, fastdg makes one of all.
        alone: one forward for each domain, whatever the network.
        asks: for one domain after the other, by ``opt.step(closure)``.
        adapter: the class that is mixed in.
    """

    parent: str
    wrap: Callable[[Any], DomainOptimizer]
    logs: Mapping[str, str]
    together: bool = False
    alone: bool = False
    asks: bool = False
    adapter: type[Adapter] = Adapter


def couples(modules: Iterable[nn.Module]) -> bool:
    """Return whether one forward of all domains differs from a forward for each: by batch
    statistics, or by the order of random numbers."""
    return any(
        m.training and (isinstance(m, BatchNorm) or (isinstance(m, Dropout) and m.p > 0))
        for m in modules
    )
