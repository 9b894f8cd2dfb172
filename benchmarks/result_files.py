"""Result files, which several runs may add to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdg.files import locked, replace

Tables = Mapping[str, Mapping[str, Any]]


def keep(path: Path, head: Mapping[str, Any], tables: Tables, fresh: bool = False) -> None:
    """Write ``head``, and add the rows of each of ``tables`` to those that the file has.

    A row is replaced by one of the same name. With ``fresh`` the file's own rows are forgotten.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be written.
    """
    with locked(path):
        try:
            there = path.exists() and not fresh
            before = json.loads(path.read_text(encoding="utf-8")) if there else {}
            rows = {name: {**before.get(name, {}), **new} for name, new in tables.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: damaged, or no result file ({error}). Restore it, or remove it."
            ) from error
        text = json.dumps({**head, **rows}, indent=1, ensure_ascii=False) + "\n"
        replace(path, lambda file: file.write(text.encode()))
