"""MNIST from its idx files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .fingerprint import of_files

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def read_train(folder: Path) -> tuple[Tensor, Tensor]:
    """MNIST's training set: images ``[60000, 28, 28]`` uint8 and digits ``[60000]`` int64.

    Args:
        folder: where the idx files are, or a folder that has them in ``mnist/``.

    Raises:
        FileNotFoundError: names the missing file and the folders.
        ValueError: a file is damaged or is not an idx file of the right shape.
    """
    images, labels = read_idx(_find(folder, IMAGES)), read_idx(_find(folder, LABELS))
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{folder}: expected images (N, 28, 28) and N labels, got {images.shape} and "
            f"{labels.shape}. Download them again."
        )
    if labels.size and labels.max() > 9:
        raise ValueError(
            f"{folder}: expected labels 0 to 9, got {labels.max()}. Download it again."
        )
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def fingerprint(folder: Path) -> str:
    """Return the fingerprint of the training set's files; arguments as of `read_train`."""
    return of_files([_find(folder, IMAGES), _find(folder, LABELS)])


def _find(folder: Path, name: str) -> Path:
    folder = Path(folder)
    tried = [base / (name + end) for base in (folder, folder / "mnist") for end in ("", ".gz")]
    for path in tried:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"data: MNIST's {name} (or {name}.gz) is neither in {folder} nor in {folder / 'mnist'}. "
        "Pass the folder that holds MNIST's idx files."
    )


def read_idx(path: Path) -> np.ndarray:
    """Return an idx file of unsigned bytes as an array; raise a ValueError if it is damaged."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = file.read()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path}: damaged, cannot unpack it: {error}. Download it again."
        ) from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(
            f"{path}: expected an idx file of unsigned bytes, which starts with 00 00 08 and its "
            f"number of dimensions, got {raw[:4].hex(' ') or 'nothing'}. Download it again."
        )
    dims = raw[3]
    shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if body.size != math.prod(shape):
        raise ValueError(
            f"{path}: damaged, shape {shape} needs {math.prod(shape)} bytes of data, "
            f"got {body.size}. Download it again."
        )
    return body.reshape(shape)
