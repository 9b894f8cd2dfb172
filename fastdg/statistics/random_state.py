"""The state of the random generators that a loss may draw from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Randomness = Literal["error", "different", "same"]


def random_state(randomness: Randomness, device: torch.device) -> list[Tensor]:
    """Return the state of the generators that ``loss`` may draw from; none where it must not."""
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
    """Repeat the random numbers that follow ``state``; restore the generators at the end."""
    if not state:
        yield
        return
    with torch.random.fork_rng([device] if len(state) > 1 else []):
        restore(state, device)
        yield
