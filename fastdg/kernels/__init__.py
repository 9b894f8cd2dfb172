"""Triton kernels, one file per op, each under the name of its op in ``fastdg.ops``.

A module has functions with the names of the ops that it computes, and ``supports``, which says why
their arguments cannot be taken.

In a clone the kernels' files are in the top-level folder ``kernels/``; an install has them beside
this one. The folder has no ``__init__.py``, so that Python started in the clone's root never
imports it in place of the package ``kernels`` that transformers and others look for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
if not (_HERE / "launch.py").exists():  # a clone
    __path__.append(str(_HERE.parents[1] / "kernels"))


def implementations(
    ops: Container[str],
) -> Iterator[tuple[str, Callable[..., Any], Callable[..., str | None]]]:
    """Yield the name of each op that a module computes, its function, and ``supports``."""
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        for name, function in vars(module).items():
            if name in ops and getattr(function, "__module__", None) == module.__name__:
                yield name, function, module.supports
