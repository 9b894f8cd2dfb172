"""Find DomainBed, and register fastdg's algorithms in it."""

from __future__ import annotations

import importlib
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .algorithms import ENTRIES
from .hparams import hparams_of
from .resume import Journal, Refused

URL = "https://github.com/facebookresearch/DomainBed"
MISSING = (
    f"DomainBed is not on the package index. Clone {URL} and say where: "
    "DOMAINBED=/path/to/DomainBed python -m fastdg.domainbed ... (PYTHONPATH does it too)."
)
IMPORTS = "Install its imports: pip install torchvision timm wilds tqdm"


def find(name: str) -> Any:
    """Return the module ``domainbed.{name}``.

    Raises:
        ImportError: there is no DomainBed, or not in the folder ``DOMAINBED``, or a module is
            missing.
    """
    if folder := os.environ.get("DOMAINBED"):
        _check_clone(Path(folder))
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        return importlib.import_module(f"domainbed.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "domainbed":
            said = f"{error}. {MISSING} {IMPORTS}"
        else:
            said = f"DomainBed imports {error.name}, which is not installed. {IMPORTS}"
        raise ImportError(said, name=error.name) from error


def _check_clone(folder: Path) -> None:
    part = Path("domainbed", "algorithms.py")
    if (folder / part).is_file():
        return
    said = f"DOMAINBED: expected the root of a clone of {URL}, which holds {part}, got {folder}"
    if not folder.is_dir():
        raise ImportError(f"{said}, which is no folder.")
    near = [folder.resolve().parent, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = next((path for path in near if (path / part).is_file()), None)
    raise ImportError(f"{said}." + (f" Set it to {found}." if found else ""))


def _enough(loader: type[Any]) -> type[Any]:
    """Make DomainBed's endless loader refuse batches larger than a domain.

    The loader draws all of a domain's samples with replacement and drops an incomplete batch: with
    a batch larger than the domain it would never end. Weighted samples (``class_balanced``) are
    drawn a batch at a time.
    """

    class InfiniteDataLoader(loader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(loader).bind(*args, **kwargs).arguments
            batch, samples = given["batch_size"], len(given["dataset"])
            if given.get("weights") is None and samples < batch:
                raise Refused(
                    f"batch_size: {batch} is more than the {samples} samples of a domain's "
                    "training split, and DomainBed would wait for a full batch for ever. Pass "
                    f"""--hparams '{{"batch_size": {samples}}}' or less."""
                )
            super().__init__(*args, **kwargs)

    return InfiniteDataLoader


def _fetching(download: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.hub's download of weights, with an error that names the file to put there."""

    def download_url_to_file(url: str, dst: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return download(url, dst, *args, **kwargs)
        except OSError as error:
            raise Refused(
                f"{dst}: there are no pre-trained weights, and the download failed ({error}). "
                f"Download {url} elsewhere and put it there."
            ) from error

    return download_url_to_file


@contextmanager
def plugged_in(journal: Journal | None = None) -> Iterator[None]:
    """DomainBed finds fastdg's algorithms under their names inside, with their hyper-parameters.

    Its own classes stay unchanged, since they build on each other.
    """
    algorithms, registry, misc = map(find, ("algorithms", "hparams_registry", "lib.misc"))
    loaders, hub = find("lib.fast_data_loader"), torch.hub
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
        (loaders, "InfiniteDataLoader", _enough(loaders.InfiniteDataLoader)),
        (hub, "download_url_to_file", _fetching(hub.download_url_to_file)),
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
    """Let a sweep launch fastdg's commands inside the ``with`` block."""
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
