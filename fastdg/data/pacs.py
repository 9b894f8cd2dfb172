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

from ..models.resnet20 import DEVIATION, MEAN
from .digits import Task

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
    """
    if (folder / ARRAYS).exists():
        with np.load(folder / ARRAYS) as arrays:
            x, y, d = (arrays[key] for key in "xyd")
        pixels = [torch.from_numpy(x[d == k]) for k in range(len(DOMAINS))]
        labels = [torch.from_numpy(y[d == k].astype("int64")) for k in range(len(DOMAINS))]
    else:
        pixels, labels = map(list, zip(*(_read(folder / name) for name in DOMAINS), strict=True))
    images = tuple(map(_normalised, pixels))
    tested = tuple(range(len(DOMAINS)))
    return Task("PACS, 32x32", DOMAINS, images, tuple(labels), len(CLASSES), tested)


def _read(folder: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image

    pixels: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(CLASSES):
        paths = sorted((folder / name).glob("*.*"))
        if not paths:
            raise FileNotFoundError(
                2, f"expected PACS's images here, or {ARRAYS} two folders above", folder / name
            )
        for path in paths:
            with Image.open(path) as image:
                small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            pixels.append(torch.from_numpy(np.array(small)))
            labels.append(label)
    return torch.stack(pixels), torch.tensor(labels)


def _normalised(pixels: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / deviation
