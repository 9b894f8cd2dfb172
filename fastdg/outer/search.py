"""Steps that begin at the best of some random weights near by."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.backward import put
from ..core.closures import Forward
from ..core.combine.gathering import to_device_async
from ..core.combine.seeded import RandomCombiner
from ..core.hyper import check_count, check_model, check_weight, hyper, option
from ..core.nesting import chain
from ..core.optimizer import Closure
from ..distributed.sharding import local, own_part

Judged = tuple[Mapping[str, Tensor], dict[Tensor, Tensor | None]]  # statistics, gradient


class Search(RandomCombiner):
    """Base of wrappers whose step with a closure first looks for weights to step from.

    A candidate is the model's weights with uniform noise on them, where noise of candidates that
    are not accepted stays. The search begins anew from the model's weights after one that is.

    An algorithm says when it ``searches``, and which candidate is `better`.
    """

    steps_without_closure = False

    size: float = hyper(1e-5, check_weight)
    candidates: int = hyper(250, check_count)
    featurizer: nn.Module | None = option(None, check_model, show=None)

    @property
    @abstractmethod
    def searches(self) -> bool:
        """Whether the next step does."""

    @abstractmethod
    def better(self, now: Mapping[str, Tensor], best: Mapping[str, Tensor]) -> Tensor:
        """Whether a candidate is accepted, 0-dim bool, given its statistics and the best one's."""

    def evaluate_closure(self, forward: Forward) -> Tensor:
        if not self.searches:
            return super().evaluate_closure(forward)
        weights = [local(p).detach() for p in self._names]
        first = [w.clone() for w in weights]
        try:
            best, statistics, gradient, accepted = self._search(forward, weights, first)
        except BaseException:
            _copy(first, weights)
            raise
        _copy(best, weights)
        put(gradient)
        for link in chain(self):
            link._mark_grad_owned()
        accepted_ = statistics["loss"].new_tensor(accepted, dtype=torch.int64)
        self._statistics = {**statistics, "accepted": accepted_}
        return statistics["loss"]

    def _search(
        self, forward: Forward, weights: Sequence[Tensor], first: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Mapping[str, Tensor], dict[Tensor, Tensor | None], int]:
        best, (seen, gradient), accepted = first, self._judge(forward), 0
        noise = self._noise()
        for _ in range(self.candidates):
            for w, added in next(noise):
                w.add_(added)
            now, new = self._judge(forward)
            if bool(self.better(now, seen)):
                best, seen, gradient = [w.clone() for w in weights], now, new
                accepted += 1
                _copy(first, weights)
        self._remember()
        return best, seen, gradient, accepted

    def _judge(self, forward: Forward) -> Judged:
        """Return statistics and gradient at the present weights."""
        self.zero_grad()
        forward.backward()
        gradient = {p: p.grad for p in self._names}
        put(dict.fromkeys(gradient))
        return self._statistics, gradient

    def _noise(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield noise for each of the parameters that get some."""
        own = None if self.featurizer is None else {*self.featurizer.parameters()}
        searched = [p for p in self._names if p.requires_grad and (own is None or p in own)]
        device = searched[0].device if self.generator is None else self.generator.device
        while True:
            # Anew for each: on rank 0 a forward may have moved torch's stream, as dropout does
            generator, found = self.generator_on(device), []
            for p in searched:
                drawn = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=device)
                drawn = to_device_async(own_part(p, (drawn * 2 - 1) * self.size), p.device)
                found.append((local(p).detach(), drawn))
            yield found

    def _step(self, closure: Closure | None) -> Tensor | None:
        if closure is None and self._ready and self.searches:
            raise RuntimeError(
                f"{type(self).__name__}.step(): step {self.steps} looks for weights by running the "
                "model several times. Call opt.step(closure), with a closure that returns "
                "(losses, domains)."
            )
        return super()._step(closure)


@torch.no_grad()
def _copy(values: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    for value, w in zip(values, to, strict=True):
        w.copy_(value)
