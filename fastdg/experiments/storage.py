"""What experiments write and read again: result files and checkpoints, each written whole."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import replace


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """``torch.save`` that a kill at any moment leaves either done or undone."""
    replace(path, lambda file: torch.save(state, file))


def write_json(value: Any, path: Path) -> None:
    """The same for JSON."""
    text = json.dumps(value, indent=1) + "\n"
    replace(path, lambda file: file.write(text.encode()))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def refuse_other(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ValueError that names every setting of ``now`` that was another at ``path``."""
    before, after = flat(was), flat(now)
    changes = [
        f"{key} was {before.get(key)!r}, now {after.get(key)!r}"
        for key in dict.fromkeys([*after, *before])
        if before.get(key) != after.get(key)
    ]
    if changes:
        raise ValueError(
            f"{path}: made with other settings ({'; '.join(changes)}); keep the settings, choose "
            "another output folder, or start afresh"
        )


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The checkpoint at ``path``, or None if there is none.

    Raises:
        ValueError: it is not a checkpoint, or belongs to a run with other settings; names them.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        was = state["identity"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a checkpoint of this program; remove it") from error
    refuse_other(path, was, identity)
    return state


def load_results(path: Path, key: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results at ``path``, or None if there are none; ``key`` is where their settings are.

    Raises:
        ValueError: not such a file, or made with other settings; names them.
    """
    if not path.exists():
        return None
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        was = results[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result file of this program; remove it") from error
    refuse_other(path, was, identity)
    return results
