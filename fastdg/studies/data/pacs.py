"""PACS: photos, art paintings, cartoons and sketches of seven classes.

Reference:
    Li, Yang, Song, Hospedales: Deeper, Broader and Artier Domain Generalization, ICCV 2017.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...files import load_arrays
from ...models.resnet20 import DEVIATION, MEAN
from .digits import Task
from .fingerprint import of_files

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
ARRAYS = "pacs_images32.npz"
SIDE = 32


@cache
def read(folder: Path) -> Task:
    """All images at 32x32, normalised as ImageNet's.

    Args:
        folder: holds the images as they are distributed, ``<domain>/<class>/<image>``, or
            ``pacs_images32.npz`` with ``x`` uint8 ``(n, 32, 32, 3)``, ``y`` and ``d``, which says
            of each image its class and domain, both in alphabetical order.

    Raises:
        FileNotFoundError: a domain or a class has no images.
        ValueError: a file is damaged, or not as described.
    """
    if (folder / ARRAYS).exists():
        x, y, d = _arrays(folder / ARRAYS)
        pixels = [torch.from_numpy(x[d == k]) for k in range(len(DOMAINS))]
        labels = [torch.from_numpy(y[d == k].astype("int64")) for k in range(len(DOMAINS))]
    else:
        pixels, labels = map(list, zip(*(_read(folder / name) for name in DOMAINS), strict=True))
    images = tuple(map(_normalised, pixels))
    tested = tuple(range(len(DOMAINS)))
    return Task("PACS, 32x32", DOMAINS, images, tuple(labels), len(CLASSES), tested)


def check(folder: Path) -> None:
    """Raise as `read` does if images are missing, without reading the images in folders."""
    if (folder / ARRAYS).exists():
        _arrays(folder / ARRAYS)
    else:
        for domain in DOMAINS:
            for name in CLASSES:
                _paths(folder / domain / name)


def fingerprint(folder: Path) -> str:
    """Return the fingerprint of the images' files; arguments as of `check`."""
    if (folder / ARRAYS).exists():
        return of_files([folder / ARRAYS])
    return of_files(p for d in DOMAINS for name in CLASSES for p in _paths(folder / d / name))


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, d = load_arrays(path, *"xyd", remedy="Make it again.").values()
    n = len(x) if x.ndim else 0
    ids = ((y, len(CLASSES)), (d, len(DOMAINS)))
    if not (
        x.dtype == np.uint8
        and x.shape == (n, SIDE, SIDE, 3)
        and all(v.shape == (n,) and v.dtype.kind in "iu" for v, _ in ids)
        and all(set(range(count)) == set(v.tolist()) for v, count in ids)
    ):
        raise ValueError(
            f"{path}: expected x uint8 (n, {SIDE}, {SIDE}, 3), y (n,) with classes 0 to "
            f"{len(CLASSES) - 1} and d (n,) with domains 0 to {len(DOMAINS) - 1}, got x "
            f"{x.dtype} {x.shape}, y {y.dtype} {y.shape}, d {d.dtype} {d.shape}. Make it again."
        )
    return x, y, d


def _paths(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.*"))
    if not paths:
        raise FileNotFoundError(
            2, f"expected PACS's images here, or {ARRAYS} two folders above", folder
        )
    return paths


def _read(folder: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image

    pixels: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(CLASSES):
        for path in _paths(folder / name):
            try:
                with Image.open(path) as image:
                    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            except Exception as error:  # each format has errors of its own
                raise ValueError(
                    f"{path}: not an image, or damaged ({error}). Replace it."
                ) from error
            pixels.append(torch.from_numpy(np.array(small)))
            labels.append(label)
    return torch.stack(pixels), torch.tensor(labels)


def _normalised(pixels: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / deviation
