"""Buffers of a model as flat tensors, so that a few operations change them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .._torch import foreach_copy_

KINDS: dict[str, Callable[[Tensor], bool]] = {
    "buffers": torch.is_floating_point,
    "counters": lambda x: not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool),
}


class Buffers:
    """Buffers in ``model.state_dict()`` by kind: floating ``"buffers"``, integer ``"counters"``.

    Other dtypes are skipped: they cannot be interpolated. So are buffers on ``meta``, which have
    no values.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = model.modules() if isinstance(model, nn.Module) else ()
        owned = {
            id(buffer): (module, name)
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        }
        self.places = list(owned.values())

    def tensors(self, kind: str) -> list[Tensor]:
        """Return the current buffers of a kind: some modules replace theirs."""
        now = [module._buffers.get(name) for module, name in self.places]
        return [b for b in now if b is not None and not b.is_meta and KINDS[kind](b)]

    def now(self) -> dict[str, Tensor]:
        """Concatenate the current buffers of each kind; kinds without buffers are omitted.

        Buffers on several devices come to one of these, an accelerator.
        """
        found = {kind: self.tensors(kind) for kind in KINDS}
        return {kind: _joined(buffers) for kind, buffers in found.items() if buffers}

    def shapes(self, kind: str) -> tuple[torch.Size, ...]:
        """Return the shapes of the current buffers of a kind."""
        return tuple(b.shape for b in self.tensors(kind))

    @torch.no_grad()
    def interpolate(self, kept: dict[str, Tensor], rate: float) -> None:
        """Set buffers and ``kept`` to ``kept + rate * (now - kept)``; integers are truncated."""
        for kind, end in self.now().items():
            start = kept[kind]
            start.copy_(start + rate * (end - start))
            self.put(kind, start)

    @torch.no_grad()
    def put(self, kind: str, value: Tensor) -> None:
        """Set the buffers of a kind, given as `now` returns them."""
        tensors = self.tensors(kind)
        pieces = value.split([b.numel() for b in tensors])
        views = [x.view(b.shape) for x, b in zip(pieces, tensors, strict=True)]
        if all(b.device == value.device for b in tensors):
            foreach_copy_(tensors, views)
            return
        for b, view in zip(tensors, views, strict=True):
            b.copy_(view)


def _joined(buffers: Sequence[Tensor]) -> Tensor:
    devices = [b.device for b in buffers]
    place = next((device for device in devices if device.type != "cpu"), devices[0])
    return torch.cat([b.reshape(-1).to(place) for b in buffers])


def size_of(flat: Tensor | None) -> int:
    return 0 if flat is None else len(flat)


def check_shapes(before: Sequence[torch.Size], now: Sequence[torch.Size]) -> None:
    """Raise ValueError unless buffers have the same number and shapes as before.

    Flat, those of other shapes would be averaged, or broadcast, without a word.
    """
    changed = [(list(a), list(b)) for a, b in zip(before, now, strict=False) if a != b]
    if len(before) != len(now):
        difference = f"{len(before)} buffers, as before, got {len(now)}"
    elif changed:
        difference = f"a buffer of shape {changed[0][0]}, as before, got {changed[0][1]}"
    else:
        return
    raise ValueError(
        f"model: expected {difference}. Buffers in its state_dict must not come, go or change "
        "their shape during a run. Register such ones with persistent=False, or make the wrapper "
        "anew."
    )


def stored(value: Tensor, place: Tensor | None) -> Tensor:
    """Copy ``value``, into ``place`` if it fits."""
    if place is None or (place.shape, place.dtype, place.device) != (
        value.shape,
        value.dtype,
        value.device,
    ):
        return value.clone()
    return place.copy_(value)
