"""DomainBed or its stand-in as tests call it."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastdg.domainbed.__main__ import script
from fastdg.domainbed.plug import find
from fastdg.studies.data import mnist

STANDIN = Path(__file__).parent / "standin"


class Bed(NamedTuple):
    """One of the two, importable.

    Attributes:
        clone: whether it is DomainBed itself.
        folder: where it is.
    """

    clone: bool
    folder: str


def only(which: str) -> Any:
    """For a test of the "stand-in" alone, or of the "clone"."""
    return pytest.mark.parametrize("bed", [which], indirect=True)


def repaired(own: Any, algorithms: Any) -> Any:
    """DomainBed's Fishr, whose call of BackPACK fills nothing in current versions."""

    class Fishr(own):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.features: list[Any] = []
            self.featurizer.register_forward_hook(lambda m, x, z: setattr(self, "features", [z]))

        def _get_grads(self, logits: Any, y: Any) -> dict[str, Any]:
            self.optimizer.zero_grad()
            with algorithms.backpack(algorithms.BatchGrad()):
                self.bce_extended(logits, y).sum().backward(
                    inputs=[*self.classifier.parameters(), *self.features],
                    retain_graph=True,
                    create_graph=True,
                )
            named = self.classifier.named_parameters()
            return {name: p.grad_batch.clone().flatten(1) for name, p in named}

    return Fishr


def first_images(data: Path, root: Path) -> None:
    """Write MNIST's first 600 images as torchvision keeps all of them."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = (t.numpy() for t in mnist.read_train(data))
    for name, part in (("train", slice(540)), ("t10k", slice(540, 600))):
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + array.astype("u1").tobytes())


Curve = list[dict[str, float]]


def curve_of(make: Callable[[str], type], monkeypatch: Any, *arguments: str) -> Curve:
    """Train by DomainBed's script; what each step returned. ``make`` finds the class."""
    curve: Curve = []

    def recorded(name: str) -> type:
        class Recorded(make(name)):  # type: ignore[misc]
            def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
                values = super().update(minibatches, unlabeled)
                curve.append(values)
                return values

        return Recorded

    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(find("algorithms"), "get_algorithm_class", recorded)
        script("train", arguments)
    return curve
