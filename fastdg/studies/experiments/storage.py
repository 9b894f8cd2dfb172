"""Result files and checkpoints of experiments, each written whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ...files import explained, load_torch, locked, replace

CHECKSUM = "sha256"  # of the rest, in a result file
DATA = "data"  # fingerprints of the data sets, in a result file
Load = Callable[[Path], dict[str, Any] | None]
Change = Callable[[dict[str, Any] | None], dict[str, Any]]


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Call ``torch.save`` so that a kill at any moment leaves the old file or the new one."""
    replace(path, lambda file: torch.save(state, file))


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write JSON in the same way, with a checksum for `load_results`."""
    text = json.dumps({**value, CHECKSUM: _checksum(value)}, indent=1) + "\n"
    replace(path, lambda file: file.write(text.encode()))


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def update_results(path: Path, load: Load, change: Change) -> dict[str, Any]:
    """Read the results at ``path``, change them and write them; other writers wait.

    Args:
        path: of the result file.
        load: reads it, or returns None if there is none.
        change: maps the results that were read to the new ones.
    """
    with locked(path):
        results = change(load(path))
        write_json(results, path)
    return results


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
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
            f"{path}: it has results of other settings ({'; '.join(changes)}). Keep the settings, "
            "choose another output folder, or start afresh."
        )


def with_data(
    path: Path, found: Mapping[str, Any] | None, data: Mapping[str, str]
) -> dict[str, Any]:
    """Return the entry of result files that says which data they were made from.

    Args:
        path: of the result file.
        found: the results in it, or None. Of a version that kept no fingerprints they get none.
        data: data set -> its fingerprint, now.

    Raises:
        ValueError: a data set was another.
    """
    if not data or (found is not None and DATA not in found):
        return {}
    before = {} if found is None else found[DATA]
    both = before.keys() & data.keys()
    then, now = ({DATA: {name: of[name] for name in both}} for of in (before, data))
    refuse_other(path, then, now)
    return {DATA: {**before, **data}}


def load_checkpoint(
    path: Path, identity: Mapping[str, Any], fields: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """Return the checkpoint at ``path``, or None if there is none; ``fields`` are to be in it.

    Raises:
        ValueError: it is damaged, or belongs to a run with other settings; names them.
        OSError: it cannot be read.
    """
    if not path.exists():
        return None
    remedy = "Remove it to start this run anew."
    state = load_torch(path, remedy)
    if not (
        isinstance(state, dict)
        and isinstance(was := state.get("identity"), dict)
        and state.keys() >= set(fields)
    ):
        raise ValueError(f"{path}: not a checkpoint of this program. {remedy}")
    refuse_other(path, was, identity)
    return state


def load_results(
    path: Path,
    key: str,
    identity: Mapping[str, Any],
    valid: Callable[[dict[str, Any]], bool],
) -> dict[str, Any] | None:
    """Return the results at ``path``, or None if there are none.

    Args:
        path: of the file.
        key: the entry with the settings that the results depend on.
        identity: these settings now.
        valid: whether the file has all entries that its readers need. It may raise a KeyError,
            TypeError or AttributeError instead of returning False.

    Raises:
        ValueError: not such a file, damaged, or made with other settings; names them.
        OSError: it cannot be read.
    """
    if not path.exists():
        return None
    with explained(path, "read"):
        raw = path.read_bytes()
    remedy = "Restore it, or remove it (or pass --fresh) to start anew."
    try:
        results: dict[str, Any] = json.loads(raw)
        checksum = results.pop(CHECKSUM, None)
        if not (isinstance(results[key], dict) and valid(results)):
            raise ValueError("it has other entries")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"there is no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: damaged, or not a result file of this program ({reason}). {remedy}"
        ) from error
    if checksum is not None and checksum != _checksum(results):  # versions before wrote none
        raise ValueError(
            f"{path}: damaged, or changed by hand: its contents do not match their checksum. "
            f'{remedy} To keep it as it is, remove its entry "{CHECKSUM}".'
        )
    refuse_other(path, results[key], identity)
    return results
