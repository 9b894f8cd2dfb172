"""fastdg's algorithms in clones of DomainBed with a trainer of their own, as SWAD's, MIRO's, SAGM's
and most papers' since: their algorithms have ``update(x, y, **kwargs)``, with a list of tensors,
one for each domain.

``python -m fastdg.domainbed trainer train_all.py ...`` runs the clone's own script, unmodified,
with all of its arguments; ``--algorithm`` may then name any of fastdg's.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .adapter import Adapter
from .adapters import FishAdapter
from .algorithms import ENTRIES
from .hparams import DOMAINBED, hparams_of
from .plug import IMPORTS
from .resume import Refused

USAGE = "python -m fastdg.domainbed trainer path/to/train_all.py ..."


class TrainerUpdate:
    """The interface of these trainers, mixed into an `Adapter`."""

    def update(self, x: Sequence[Tensor], y: Sequence[Tensor], **kwargs: Any) -> dict[str, float]:
        """Make one step on a batch of each domain; ``kwargs`` (``step``, views) are unused."""
        return super().update(list(zip(x, y, strict=True)))  # type: ignore[misc]

    def clone(self) -> Any:
        """Return a copy with its own optimizer, whose state, wrapper's included, is the same."""
        return copy.deepcopy(self)


@contextmanager
def plugged_into_trainer() -> Iterator[None]:
    """The clone finds fastdg's algorithms under their names inside, with their hyper-parameters.

    An algorithm's network and optimizer are those that the clone's ERM makes. Defaults that the
    clone's own registry has stay.
    """
    algorithms, registry = map(_module, ("algorithms", "hparams_registry"))
    own_class, own_hparams = algorithms.get_algorithm_class, registry._hparams
    known = inspect.signature(algorithms.ERM.update).parameters
    if not {"x", "y"} <= set(known):
        raise Refused(
            "domainbed.algorithms: expected update(self, x, y, **kwargs), as in SWAD's clone of "
            f"DomainBed, got update({', '.join(known)}). For DomainBed itself call python -m "
            "fastdg.domainbed."
        )

    def get_algorithm_class(name: str) -> type:
        if (entry := ENTRIES.get(name)) is None:
            return own_class(name)
        # FishAdapter repeats DomainBed's random numbers
        adapter = Adapter if entry.adapter is FishAdapter else entry.adapter
        bases = (TrainerUpdate, adapter, algorithms.ERM)
        return type(name, bases, {"entry": entry, "__module__": __name__})

    def _hparams(algorithm: str, dataset: str, random_state: Any) -> dict[str, tuple[Any, Any]]:
        hparams = own_hparams(algorithm, dataset, random_state)
        ours = {**DOMAINBED.get(algorithm, {}), **hparams_of(algorithm, dataset)}
        for name, (default, draw) in ours.items():
            hparams.setdefault(name, (default, draw(random_state)))
        return hparams

    patches = [
        (algorithms, "get_algorithm_class", get_algorithm_class),
        (registry, "_hparams", _hparams),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in patches]
    alias = not hasattr(np, "int")  # the clones are older than NumPy 1.24, which dropped it
    try:
        for module, name, value in patches:
            setattr(module, name, value)
        if alias:
            np.int = int  # type: ignore[attr-defined]
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        if alias:
            del np.int  # type: ignore[attr-defined]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"domainbed.{name}")
    except ModuleNotFoundError as error:
        raise Refused(f"domainbed.{name}: {error}. Call {USAGE} {IMPORTS}") from error


def run_trainer(arguments: Sequence[str]) -> None:
    """Run the script ``arguments[0]`` of a clone, as if it had been called with the others.

    Raises:
        Refused: there is no such script, there is no package ``domainbed`` beside it, or its
            algorithms have another interface.
    """
    if not arguments or not Path(arguments[0]).is_file():
        got = arguments[0] if arguments else "nothing"
        raise Refused(f"trainer: expected a script of the clone, got {got}. Call {USAGE}")
    script = arguments[0]
    before = sys.argv, sys.stdout, sys.stderr, list(sys.path)
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = list(arguments)
    try:
        with plugged_into_trainer():
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.stdout, sys.stderr, sys.path[:] = before
