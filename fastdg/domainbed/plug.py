"""Finding DomainBed, and putting fastdg's algorithms into it."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .algorithms import ENTRIES, hparams_of
from .resume import Journal

MISSING = (
    "DomainBed is not on the package index. Clone https://github.com/facebookresearch/DomainBed "
    "and say where: DOMAINBED=/path/to/DomainBed python -m fastdg.domainbed ... (PYTHONPATH does "
    "it too). What it imports: pip install torchvision timm wilds tqdm"
)


def find(name: str) -> Any:
    """The module ``domainbed.{name}``.

    Raises:
        ImportError: there is no DomainBed, or it lacks something.
    """
    folder = os.environ.get("DOMAINBED")
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(f"domainbed.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}. {MISSING}", name=error.name) from error


@contextmanager
def plugged_in(journal: Journal | None = None) -> Iterator[None]:
    """DomainBed finds fastdg's algorithms under their names inside, with their hyper-parameters.

    Its own classes stay what they are, for they are made of each other.
    """
    algorithms, registry, misc = map(find, ("algorithms", "hparams_registry", "lib.misc"))
    own_class, own_hparams = algorithms.get_algorithm_class, registry._hparams

    def get_algorithm_class(name: str) -> type:
        if (entry := ENTRIES.get(name)) is None:
            return own_class(name)
        bases = (entry.adapter, own_class(entry.parent))
        return type(name, bases, {"entry": entry, "journal": journal, "__module__": __name__})

    def _hparams(algorithm: str, dataset: str, random_seed: int) -> dict[str, tuple[Any, Any]]:
        hparams = own_hparams(algorithm, dataset, random_seed)
        for name, (default, draw) in hparams_of(algorithm, dataset).items():
            state = np.random.RandomState(misc.seed_hash(random_seed, name))
            hparams[name] = default, draw(state)
        return hparams

    names = [*algorithms.ALGORITHMS]
    patches = [
        (algorithms, "get_algorithm_class", get_algorithm_class),
        (algorithms, "ALGORITHMS", names + [name for name in ENTRIES if name not in names]),
        (registry, "_hparams", _hparams),
    ]
    if journal is not None:
        patches.append((misc, "accuracy", journal.accuracy))
    before = [(module, name, getattr(module, name)) for module, name, _ in patches]
    try:
        for module, name, value in patches:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


COMMAND = f"{shlex.quote(sys.executable)} -m fastdg.domainbed"


@contextmanager
def launching_fastdg() -> Iterator[None]:
    """Inside, the commands that a sweep launches are fastdg's."""
    registry = find("command_launchers").REGISTRY
    before = dict(registry)

    def ours(launcher: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
        theirs = "python -m domainbed.scripts.train"
        return lambda commands: launcher([c.replace(theirs, COMMAND, 1) for c in commands])

    registry.update({name: ours(launcher) for name, launcher in before.items()})
    try:
        yield
    finally:
        registry.update(before)
