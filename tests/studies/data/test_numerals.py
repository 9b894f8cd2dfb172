"""The numerals that stand for the digits' names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastdg.studies.data.digits import ANGLES, turn
from fastdg.studies.data.numerals import coloured_texts, numerals, rotated_texts


def test_they_are_what_the_file_says_they_are() -> None:
    """Drawn anew; another version of the font may set a pixel elsewhere."""
    matplotlib = pytest.importorskip("matplotlib")
    drawing = pytest.importorskip("PIL.ImageDraw")
    from PIL import Image, ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), 256)
    for digit, shipped in enumerate(numerals()):
        left, top, right, bottom = font.getbbox(str(digit))
        image = Image.new("L", (round(right - left), round(bottom - top)))
        drawing.Draw(image).text((-left, -top), str(digit), 255, font)
        wide = np.zeros((32, 32))
        wide[:, 4:28] = np.asarray(image.resize((24, 32), Image.Resampling.BOX))
        counts = (wide > 127.5).reshape(8, 4, 8, 4).sum((1, 3))
        assert np.abs(16 * shipped[0].numpy() - counts).mean() < 0.5


def test_they_are_nearest_to_their_own_class() -> None:
    """Printed 3s are more like written 3s than like other written digits, on the average."""
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    written = np.stack([bunch.images[bunch.target == c].mean(0).flatten() for c in range(10)])
    written = torch.from_numpy(written - written.mean(0)).float()
    printed = rotated_texts([0]).classes
    cosine = torch.nn.functional.cosine_similarity(printed[:, None], written[None], dim=2)
    assert (cosine.argmax(1) == torch.arange(10)).sum() >= 8


def test_rotated_texts() -> None:
    classes, anchors = rotated_texts([0, 2, 5])
    assert classes.shape == (10, 64) and anchors.shape == (10, 3, 64)
    torch.testing.assert_close(anchors[:, 0], classes)
    wanted = turn(numerals(), ANGLES[5]).flatten(1)
    torch.testing.assert_close(anchors[:, 2], wanted - wanted.mean(0))
    torch.testing.assert_close(classes.sum(0), torch.zeros(64), atol=1e-5, rtol=0)


def test_coloured_texts() -> None:
    """The labels say whether the digit is below five."""
    classes, anchors = coloured_texts([0, 1])
    assert classes.shape == (2, 64) and anchors is None
    below = rotated_texts([0]).classes[:5].mean(0)
    torch.testing.assert_close(classes[1], below)
    torch.testing.assert_close(classes[0], -below)
