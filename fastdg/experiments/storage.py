"""Files that are either whole or not there: written under another name, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """``torch.save`` that a kill at any moment leaves either done or undone."""
    _replace(path, lambda file: torch.save(state, file))


def write_json(value: Any, path: Path) -> None:
    """The same for JSON."""
    text = json.dumps(value, indent=1) + "\n"
    _replace(path, lambda file: file.write(text.encode()))


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint at ``path``, or None if there is none.

    Raises:
        ValueError: it belongs to a run with other settings; names them.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    other = {
        k: (state["identity"].get(k), v)
        for k, v in identity.items()
        if state["identity"].get(k) != v
    }
    if other:
        changes = ", ".join(f"{k} was {was!r}, now {now!r}" for k, (was, now) in other.items())
        raise ValueError(
            f"{path}: this checkpoint is of a run with other settings ({changes}); use the same "
            f"settings, "
            "another output folder, or --fresh"
        )
    return state
