"""Two domain-generalisation tasks on scikit-learn's bundled handwritten digits (1,797 real 8x8
images).

Reference:
    Alpaydin, Kaynak: Optical Recognition of Handwritten Digits, UCI, 1998.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .fingerprint import of_arrays

ANGLES = (0, 15, 30, 45, 60, 75)
COLOUR_FLIPS = (0.1, 0.2, 0.9)  # of the training domains and, last, of the test domain
LABEL_FLIP = 0.25
SHIFTS = 9


@dataclass(frozen=True)
class Task:
    """Images of several domains.

    Attributes:
        name: of the task.
        domains: the domains' names.
        images: one tensor ``[n, C, 8, 8]`` in [0, 1] a domain.
        labels: one int64 tensor ``[n]`` a domain.
        classes: number of classes.
        tested: which domains are left out in turn.
        best: the accuracy, in per cent, that knowing the truth would give; None if 100.
        cue: the accuracy, in per cent, of a model of the cue that misleads in the tested domain;
            None if there is no such cue.
        story: what the domains are, and which are left out, in a sentence.
        copies: how often each image is there; a domain's rows are that many times all its images.
    """

    name: str
    domains: tuple[str, ...]
    images: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    classes: int
    tested: tuple[int, ...]
    best: float | None = None
    copies: int = 1
    cue: float | None = None
    story: str = ""


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32)) / 16
    return images, torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))


def fingerprint() -> str:
    """Return the fingerprint of the images and their labels."""
    return of_arrays(x.numpy() for x in _digits())


def coloured(seed: int) -> Task:
    """Binary labels (digit < 5, flipped with probability 0.25) and a colour that predicts them.

    In the training domains the colour is wrong in 10 % and 20 % of the images, in the test domain
    in 90 %: a model of the colour is right there in 10 %, a model that ignores it in at most 75 %.
    Each image is used nine times, shifted by up to a pixel, with label and colour drawn anew: from
    few images alone a network would memorise the wrong labels.
    """
    images, digits = _digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits), generator=generator)
    xs, ys = [], []
    for domain, flip in enumerate(COLOUR_FLIPS):
        rows = order[domain :: len(COLOUR_FLIPS)]
        pixels, rows = shifted(images[rows]), rows.repeat(SHIFTS)
        wrong = torch.rand(len(rows), generator=generator) < LABEL_FLIP
        labels = (digits[rows] < 5) ^ wrong
        colour = labels ^ (torch.rand(len(rows), generator=generator) < flip)
        x = torch.stack([pixels, pixels], 1)
        x[torch.arange(len(rows)), (~colour).long()] = 0
        xs.append(x)
        ys.append(labels.long())
    names = tuple(f"colour wrong in {100 * flip:.0f} %" for flip in COLOUR_FLIPS)
    best = 100 * (1 - LABEL_FLIP)
    cue = 100 * (1 - COLOUR_FLIPS[-1])
    story = (
        "is the digit below 5? Its colour tells in the two training domains, and misleads in the "
        "third, which is left out"
    )
    return Task(
        "coloured digits", names, tuple(xs), tuple(ys), 2, (2,), best, SHIFTS, cue=cue, story=story
    )


def rotated(seed: int, angles: Sequence[int] = ANGLES) -> Task:
    """All ten digits; each domain holds its share of the images, turned by its own angle."""
    images, digits = _digits()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    parts = [order[domain :: len(angles)] for domain in range(len(angles))]
    xs = [turn(images[rows].unsqueeze(1), angle) for rows, angle in zip(parts, angles, strict=True)]
    names = tuple(f"{angle}°" for angle in angles)
    ys = tuple(digits[rows] for rows in parts)
    story = "which digit is it? Each domain is turned by its own angle; each is left out in turn"
    tested = tuple(range(len(angles)))
    return Task("rotated digits", names, tuple(xs), ys, 10, tested, story=story)


def shifted(images: Tensor) -> Tensor:
    """``images [n, H, W]`` moved by -1, 0 and 1 pixels both ways, ``[SHIFTS * n, H, W]``; zeros
    come in."""
    height, width = images.shape[1:]
    wide = F.pad(images, (1, 1, 1, 1))
    return torch.cat([wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)])


def turn(images: Tensor, degrees: float) -> Tensor:
    """``images [n, 1, H, W]`` turned counter-clockwise, bilinear, zeros outside."""
    angle = torch.tensor(degrees * torch.pi / 180)
    c, s = float(angle.cos()), float(angle.sin())
    grid = F.affine_grid(
        torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(images), 2, 3),
        list(images.shape),
        align_corners=False,
    )
    return F.grid_sample(images, grid, align_corners=False)


TASKS = {"coloured": coloured, "rotated": rotated}
