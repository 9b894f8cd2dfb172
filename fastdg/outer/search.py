"""Steps that begin at the best of some random weights near by."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.backward import put
from ..core.closures import Forward
from ..core.combine.seeded import RandomCombiner
from ..core.hyper import check_count, check_model, check_weight, fixed, hyper, option
from ..core.nesting import chain
from ..core.optimizer import Closure
from ..distributed.sharding import local, own_part
from ..domains import to_device_async
from ..warn import warn_user

Judged = tuple[Mapping[str, Tensor], dict[Tensor, Tensor | None]]  # statistics, gradient


class Search(RandomCombiner):
    """Base of wrappers whose step with a closure first looks for weights to step from.

    A candidate is the model's weights with uniform noise on them, where noise of candidates that
    are not accepted stays. The search begins anew from the model's weights after one that is.

    An algorithm says when it ``searches``, and which candidate is `better`.
    """

    steps_without_closure = False
    _noise_seen = False  # whether a candidate was compared with the weights it began with

    _first: Sequence[Tensor] | None = fixed(None, init=False)  # weights before a search
    _transient = (*RandomCombiner._transient, "_first")

    size: float = hyper(1e-5, check_weight)
    candidates: int = hyper(250, check_count)
    featurizer: nn.Module | None = option(None, check_model, show=None)

    def _start(self) -> None:
        super()._start()
        self._searched(p for group in self.param_groups for p in group["params"])

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
        drawn = self._generator_state()
        try:
            best, statistics, gradient, accepted = self._search(forward, weights, first)
        except BaseException:
            self._first, self._drawn_before = first, drawn
            self._undo()
            raise
        self._first, self._drawn_before = first, drawn
        _copy(best, weights)
        put(gradient)
        for link in chain(self):
            link._mark_grad_owned()
        count = statistics["loss"].new_tensor(accepted, dtype=torch.int64)
        self._statistics = {**statistics, "accepted": count}
        return statistics["loss"]

    def _search(
        self, forward: Forward, weights: Sequence[Tensor], first: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Mapping[str, Tensor], dict[Tensor, Tensor | None], int]:
        best, (seen, gradient), accepted = first, self._judge(forward), 0
        noise = self._noise()
        for _ in range(self.candidates):
            drawn = next(noise)
            if not self._noise_seen:
                self._warn_of_lost(drawn)
            for w, added in drawn:
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
        searched = self._searched(p for p in self._names if p.requires_grad)
        device = searched[0].device if self.generator is None else self.generator.device
        while True:
            # Anew for each: on rank 0 a forward may have moved torch's stream, as dropout does
            generator, found = self.generator_on(device), []
            for p in searched:
                drawn = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=device)
                drawn = to_device_async(own_part(p, (drawn * 2 - 1) * self.size), p.device)
                found.append((local(p).detach(), drawn))
            yield found

    def _searched(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Choose the parameters that get noise, or raise ValueError if there are none."""
        if self.featurizer is None:
            return [*parameters]
        own = {*self.featurizer.parameters()}
        if not (found := [p for p in parameters if p in own]):
            raise ValueError(
                f"featurizer: expected a part of the model that the optimizer trains, got a "
                f"{type(self.featurizer).__name__} none of whose parameters it does. Pass another "
                "part, add its parameters to the optimizer, or let them require gradients."
            )
        return found

    def _warn_of_lost(self, drawn: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Warn once of noise that rounding swallows."""
        self._noise_seen = True
        changed = sum(int((w + added != w).count_nonzero()) for w, added in drawn)
        entries = sum(w.numel() for w, _ in drawn)
        if self.size and changed < entries / 2:
            dtypes = ", ".join(sorted({str(w.dtype) for w, _ in drawn}))
            warn_user(
                f"size: noise of {self.size:g} changes {changed} of {entries} weights in {dtypes}; "
                "rounding swallows the rest, so the candidates hardly differ. Keep the weights in "
                "float32 (autocast computes in half precision), or pass a larger size."
            )

    def _step(self, closure: Closure | None) -> Tensor | None:
        if closure is None and self._ready and self.searches:
            raise RuntimeError(
                f"{type(self).__name__}.step(): step {self.steps} looks for weights by running the "
                "model several times. Call opt.step(closure), with a closure that returns "
                "(losses, domains)."
            )
        return super()._step(closure)

    def _undo(self) -> None:
        """Go back to the weights that the search began with."""
        super()._undo()
        if self._first is not None:
            _copy(self._first, [local(p).detach() for p in self._names])
            self.zero_grad()  # a gradient at other weights

    def _release_grad(self) -> None:
        super()._release_grad()
        self._first = None


@torch.no_grad()
def _copy(values: Sequence[Tensor], to: Sequence[Tensor]) -> None:
    for value, w in zip(values, to, strict=True):
        w.copy_(value)
