"""Combiners that get the weights of the domains from a user's function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...domains import readable, tracing
from ...warn import warn_user
from ..declared_state import Group, ObjectState
from .combiner import GradientCombiner
from .gathering import DomainBatch
from .weighting_state import load_weighting, not_saved, smallest_trace, stamp, weighting_state
from .weightings import Weighting, keeps_state


def _read(opt: WeightedCombiner) -> dict[str, Any] | None:
    return opt._weighting_state()


def _write(opt: WeightedCombiner, state: dict[str, Any]) -> None:
    opt._extent, opt._moves = state["domains"], True
    load_weighting(opt.weighting, state["values"], opt._home())


def _check(opt: WeightedCombiner, group: Group) -> None:
    state, name = group.get(f"{opt.prefix}_weighting"), type(opt.weighting).__name__
    if state is not None and state["kind"] != name:
        raise ValueError(
            f"state_dict: its weighting is a {state['kind']}, got a {name}. Create "
            f"{type(opt).__name__} with the weighting of the saved run."
        )
    if state is None and group.get(f"{opt.prefix}_steps") and keeps_state(opt.weighting):
        warn_user(
            f"state_dict: it has no state of the weighting, so this {name} keeps its own. "
            "Checkpoints of earlier versions had none."
        )


class WeightedCombiner(GradientCombiner):
    """Calls the user's ``weighting``, checks its results, and saves its state.

    A class declares two arguments: ``weighting``, ``[D, D]`` Gram matrix -> ``[D]`` weights, and
    ``normalize``, whether the matrix is divided by the power of two next to its trace.
    """

    weighting: Weighting
    normalize: bool

    learned = ObjectState("weighting", read=_read, write=_write, check=_check, fresh=False)

    def _start(self) -> None:
        self._extent: int | None = None  # number of domains in the weighting's state
        self._readable = False  # whether domains with samples are known without a wait
        self._warned = self._warned_lost = self._warned_absent = False
        self._moves = False  # whether a call has changed the weighting's attributes

    def _batch(
        self, losses: Tensor, domains: Tensor, terms: Tensor | None, **own: Any
    ) -> DomainBatch:
        self._readable = (self._readable or not self._micro_batches) and readable(domains)
        return super()._batch(losses, domains, terms, **own)

    @property
    def keeps_state(self) -> bool:
        """Whether the weighting declares state, or a call has changed it."""
        return self._moves or keeps_state(self.weighting)

    def check_extent(self, extent: int) -> None:
        if self._extent not in (None, extent):
            raise ValueError(
                f"num_domains: the {type(self.weighting).__name__} keeps state of {self._extent} "
                f"domains, got a batch of {extent}. Pass num_domains=, the number of all training "
                "domains."
            )
        self._extent = extent

    def ask(self, gram: Tensor) -> Tensor:
        """Return the weighting's weights for a Gram matrix."""
        finite = gram.isfinite().all()
        scaled = self._loss_scale.scaler is not None
        if scaled:  # the scaler skips the step, but solvers raise on infinities
            gram = gram.where(finite, torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        if self.normalize:
            trace = gram.diagonal().sum().double()
            exponent = torch.frexp(trace.where(finite, 1.0)).exponent
            gram = torch.ldexp(gram.double(), -exponent).to(gram.dtype)
        elif not self._warned and not tracing():
            self._check_trace(gram)
        before = None if self.keeps_state or tracing() else stamp(self.weighting)
        weights = self.weighting(gram.clone())  # it may write there
        if before is not None and stamp(self.weighting) != before:
            self._moves = True
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"weighting: it must return floating-point weights, got {kind}.")
        if weights.shape != gram.shape[:1]:
            raise ValueError(
                f"weighting: it must return weights of shape {tuple(gram.shape[:1])} for a "
                f"Gram matrix of shape {tuple(gram.shape)}, got {tuple(weights.shape)}."
            )
        if self._ranks.size > 1 and not getattr(self.weighting, "same_on_all_ranks", False):
            weights = self._ranks.broadcast_from_rank0(weights.detach()).to(weights.device)
        return weights.where(finite, torch.nan) if scaled else weights

    def warn_of_absent(self) -> None:
        """Warn once that a weighting with undeclared state gets only some of the domains."""
        if self._moves and not (keeps_state(self.weighting) or self._warned_absent):
            self._warned_absent = True
            warn_user(
                f"absent: the {type(self.weighting).__name__} changes from step to step, but gets "
                "only the domains of this batch, and may mistake them for others. Pass "
                'absent="zeros", or "drop" if it keeps no state by domain.'
            )

    def _check_trace(self, gram: Tensor) -> None:
        least = smallest_trace(self.weighting)
        if least and (trace := float(gram.diagonal().sum())) < least:
            self._warned = True
            warn_user(
                f"weighting: {type(self.weighting).__name__} treats gradients as zeros if the "
                f"trace of their Gram matrix is below norm_eps={least:g}, got {trace:.3g}, so "
                "conflicts remain. Pass normalize=True."
            )

    def _home(self) -> torch.device:
        return next(iter(self._names)).device

    def _weighting_state(self) -> dict[str, Any] | None:
        if not self.keeps_state:
            return None
        name, lost = type(self.weighting).__name__, not_saved(self.weighting)
        if lost and not self._warned_lost:
            self._warned_lost = True
            warn_user(
                f"state_dict: cannot save {', '.join(lost)} of the {name}. Use numbers, tensors, "
                "or lists and dicts of these."
            )
        values = weighting_state(self.weighting, self._home())
        return {"kind": name, "domains": self._extent, "values": values}
