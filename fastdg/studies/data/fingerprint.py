"""Fingerprints of data, which result files keep."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ...files import explained

DIGITS = 16  # of a SHA-256, in hexadecimal


def of_files(paths: Iterable[Path]) -> str:
    """Return the fingerprint of the contents of files, in this order.

    Raises:
        OSError: a file cannot be read.
    """
    found = hashlib.sha256()
    for path in paths:
        with explained(path, "read"), open(path, "rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
    return found.hexdigest()[:DIGITS]


def of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """Return the fingerprint of arrays: their dtypes, shapes and values."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:DIGITS]
