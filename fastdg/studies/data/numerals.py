"""Names of the digits: printed numerals, in the place of the texts that RISE needs.

The demo downloads nothing, hence no text encoder. A numeral is the written name of its class.
Printed numerals are as unlike handwriting as names are, yet 3 is nearer to 8 than to 1. So the
"text embedding" of a class is a picture of its name in the font DejaVu Sans, and the embedding of a
class in a domain is the same picture as it looks there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...text import TextTables
from .digits import ANGLES, turn

_FILE = Path(__file__).with_name("numerals.txt")


def numerals() -> Tensor:
    """Return the numerals ``[10, 1, 8, 8]`` in [0, 1], as the images of the tasks."""
    counts = np.loadtxt(_FILE, dtype=np.float32).reshape(10, 1, 8, 8)
    return torch.from_numpy(counts) / 16


def rotated_texts(domains: Sequence[int]) -> TextTables:
    """Return the texts of the rotated digits: each numeral, upright ``[10, 64]``, and turned by the
    angles of these domains ``[10, A, 64]``; all without the mean of the ten numerals."""
    images = numerals()
    turned = torch.stack([_apart(turn(images, ANGLES[d])) for d in domains], 1)
    return TextTables(_apart(images), turned)


def coloured_texts(domains: Sequence[int]) -> TextTables:
    """Return the texts of the coloured digits: the means of 5 to 9 and of 0 to 4, the two classes
    ``[2, 64]``. Colour has no picture, so there are no anchors."""
    embeddings = _apart(numerals())
    return TextTables(torch.stack([embeddings[5:].mean(0), embeddings[:5].mean(0)]), None)


def _apart(images: Tensor) -> Tensor:
    embeddings = images.flatten(1)
    return embeddings - embeddings.mean(0)
