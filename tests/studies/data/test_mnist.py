"""MNIST's idx files: plain or gzipped, in the folder or one below, and every kind of damage."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fastdg.studies.data.mnist import IMAGES, LABELS, read_idx, read_train


def idx(array: np.ndarray) -> bytes:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.fixture
def mnist() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    return images, random.integers(0, 10, 7, dtype=np.uint8)


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_plain_or_zipped_in_the_folder_or_below(
    tmp_path: Path, mnist: tuple[np.ndarray, np.ndarray], zipped: bool, below: bool
) -> None:
    folder = tmp_path / "mnist" if below else tmp_path
    folder.mkdir(exist_ok=True)
    for name, array in zip((IMAGES, LABELS), mnist, strict=True):
        raw = idx(array)
        path = folder / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    images, digits = read_train(tmp_path)
    assert (images.numpy() == mnist[0]).all()
    assert (digits.numpy() == mnist[1]).all()


def test_missing_files_are_named_with_both_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        read_train(tmp_path)
    for word in (IMAGES, str(tmp_path), str(tmp_path / "mnist")):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "got nothing"),
        (b"\x89PNG and more", "got 89 50 4e 47"),
        (b"\x00\x00\x08\x03\x00\x00", "expected an idx file"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "needs 6 bytes of data, got 5"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", "needs 6 bytes of data, got 7"),
    ],
)
def test_a_damaged_file_says_how(tmp_path: Path, raw: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=words) as error:
        read_idx(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", ["no gzip", "cut", "bits"])
def test_a_damaged_gzip_says_so(tmp_path: Path, damage: str) -> None:
    random = np.random.default_rng(0)
    packed = gzip.compress(idx(random.integers(0, 256, (9, 9, 9), dtype=np.uint8)))
    path = tmp_path / "file.gz"
    middle = len(packed) // 2
    path.write_bytes(
        {
            "no gzip": b"plain text",
            "cut": packed[:middle],
            "bits": packed[:20] + bytes(50) + packed[70:],
        }[damage]
    )
    with pytest.raises(ValueError, match="damaged"):
        read_idx(path)


def test_images_and_labels_must_belong_together(
    tmp_path: Path, mnist: tuple[np.ndarray, np.ndarray]
) -> None:
    (tmp_path / IMAGES).write_bytes(idx(mnist[0]))
    (tmp_path / LABELS).write_bytes(idx(mnist[1][:-1]))
    with pytest.raises(ValueError, match="N labels"):
        read_train(tmp_path)
