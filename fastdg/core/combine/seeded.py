"""Algorithms that draw random numbers, from a generator that checkpoints keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..hyper import check_generator, option
from .combiner import Combined, GradientCombiner


class RandomCombiner(GradientCombiner):
    """Keeps the state of ``generator`` in ``param_groups[0]``, so that a run resumes bit for bit.

    Args:
        base: the optimizer to wrap.
        generator: where random numbers come from; None: torch's global generator, the state of
            which is the user's to keep.
        num_domains, model, check: as in `GradientCombiner`.
    """

    generator: torch.Generator | None = option(None, check_generator)

    def _counters(self) -> dict[str, Any]:
        return {**super()._counters(), "generator": self._generator_state()}

    def _generator_state(self) -> Tensor | None:
        return None if self.generator is None else self.generator.get_state()

    def device_of(self, combined: Combined) -> torch.device:
        """Where to draw numbers for these gradients: the generator's device, else theirs."""
        return next(iter(combined)).device if self.generator is None else self.generator.device

    def generator_on(self, device: torch.device) -> torch.Generator | None:
        """What to draw from on ``device``; on several ranks all draw what rank 0 would alone."""
        own, ranks = self.generator, self._ranks
        if ranks.size == 1:
            return own
        on_cpu = device.type == "cpu"
        default = torch.default_generator if on_cpu else torch.cuda.default_generators[device.index]
        state = ranks.broadcast_from_rank0((own or default).get_state())
        if own is None and ranks.rank == 0:
            return None
        source = own or torch.Generator(device)
        source.set_state(state)
        return source

    def _remember(self) -> None:
        """Write down how far the generator has come."""
        self.param_groups[0][f"{self.prefix}_generator"] = self._generator_state()

    def _gradient(self, staged: Sequence[Any]) -> Tensor:
        if self._pending is None and self._scaler is not None:
            self._pending = self._generator_state()
        loss = super()._gradient(staged)
        self._remember()
        return loss

    def _skip(self) -> None:
        if self.generator is not None:
            self.generator.set_state(self._pending)
            self._remember()

    def _finish_load(self) -> None:
        super()._finish_load()
        state = self.param_groups[0][f"{self.prefix}_generator"]
        if self.generator is not None and state is not None:
            self.generator.set_state(state.cpu())

    def _validate_state(
        self, kept: dict[str, dict[Tensor, Tensor]], groups: Sequence[dict[str, Any]]
    ) -> None:
        super()._validate_state(kept, groups)
        state = groups[0].get(f"{self.prefix}_generator")
        if state is None:
            return
        if self.generator is None:
            raise ValueError(
                f"state_dict: it has the state of a generator, but this {type(self).__name__} has "
                "none, so its run would not go on as it was; pass generator=torch.Generator()"
            )
        if len(state) != len(self.generator.get_state()):
            raise ValueError(
                "state_dict: its generator was not one of the device "
                f"{str(self.generator.device)!r}, as the one given here is"
            )

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if name != "generator"}
