"""Algorithms that draw random numbers, from a generator that checkpoints save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..declared_state import Group, ObjectState
from ..hyper import check_generator, fixed, option
from ..optimizer import DomainOptimizer
from .combiner import Combined, GradientCombiner


def random_state(name: str) -> ObjectState:
    """Declare that a generator, the attribute ``name`` or None, is saved with a run."""

    def read(opt: Any) -> Tensor | None:
        generator = getattr(opt, name)
        return None if generator is None else generator.get_state()

    def write(opt: Any, state: Tensor) -> None:
        getattr(opt, name).set_state(state.cpu())

    def check(opt: Any, group: Group) -> None:
        generator, state = getattr(opt, name), group.get(f"{opt.prefix}_{name}")
        if state is None:
            return
        if generator is None:
            raise ValueError(
                f"state_dict: it has the state of a generator, but this {type(opt).__name__} has "
                "none, and would draw other numbers. Pass generator=torch.Generator()."
            )
        if len(state) != len(generator.get_state()):
            raise ValueError(
                "state_dict: it has the state of a generator of another device, got a generator "
                f"on {str(generator.device)!r}. Pass one on the device of the saved run."
            )

    return ObjectState(name, read=read, write=write, check=check, fresh=True)


class Seeded(DomainOptimizer):
    """Keeps the state of ``generator`` in ``param_groups[0]``, so that a run resumes bit for bit.

    Args:
        base: optimizer to wrap.
        generator: generator of random numbers; None: torch's global generator, whose state the
            user saves.
        num_domains, model, check: as in `DomainOptimizer`.
    """

    generator: torch.Generator | None = option(None, check_generator, show=None)

    drawn = random_state("generator")
    _drawn_before: Tensor | None = fixed(None, init=False)  # the generator's state before a step

    def generator_on(self, device: torch.device) -> torch.Generator | None:
        """Return the generator on ``device``; on several ranks all draw the numbers of rank 0."""
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

    def _generator_state(self) -> Tensor | None:
        """Return the state for `_drawn_before`, where a step draws numbers outside `backward`."""
        return None if self.generator is None else self.generator.get_state()

    def _undo(self) -> None:
        super()._undo()
        if self.generator is not None and self._drawn_before is not None:
            self.generator.set_state(self._drawn_before)
            self._remember()

    def _release_grad(self) -> None:
        super()._release_grad()
        self._drawn_before = None

    def _gradient(self, staged: Sequence[Any]) -> Tensor:
        loss = super()._gradient(staged)
        self._remember()  # the generator's state after this step
        return loss


class RandomCombiner(Seeded, GradientCombiner):
    """A `GradientCombiner` with a ``generator``."""

    def device_of(self, combined: Combined) -> torch.device:
        """Return the device for random numbers: the generator's, else the gradients'."""
        return next(iter(combined)).device if self.generator is None else self.generator.device
