"""The data sets of the benchmark: rows of features of several domains, read from the user's disk.

Nothing here looks at more than one row at a time, so no domain learns of another. The statistics
that features are scaled or chosen by are `folds.py`'s, from training rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...files import load_arrays
from ..data import digits
from ..data.fingerprint import of_files

Rows = tuple[Any, np.ndarray]  # features, an array or a sparse matrix [n, F], and labels int64 [n]


@dataclass(frozen=True)
class DataSet:
    """Rows of several domains.

    Attributes:
        title: in tables and figures.
        domains: their names.
        classes: number of classes.
        read: (data folder, seed) -> each domain's rows. Only the digits depend on the seed.
        file: in the data folder; None: it comes with scikit-learn.
        scaled: whether features are standardised, by the training rows.
        columns: how many features are kept, the ones that most training rows have; None: all.
        source: of the data and of the features.
    """

    title: str
    domains: tuple[str, ...]
    classes: int
    read: Callable[[Path | None, int], list[Rows]]
    file: str | None
    scaled: bool
    source: str
    columns: int | None = None


def _arrays(name: str, data: Path | None, domains: int, classes: int, *more: str) -> dict[str, Any]:
    """Read an ``.npz`` with classes ``y`` and domains ``d`` of n rows."""
    assert data is not None
    path = data / name
    arrays = load_arrays(path, "y", "d", *more, remedy="Make it again.")
    y, d = arrays["y"], arrays["d"]
    if not all(
        v.shape == (len(y),) and v.dtype.kind in "iu" and set(v.tolist()) == set(range(count))
        for v, count in ((y, classes), (d, domains))
    ):
        raise ValueError(
            f"{path}: expected y with classes 0 to {classes - 1} and d with domains 0 to "
            f"{domains - 1}, one of each a row, got y {y.dtype} {y.shape} and d {d.dtype} "
            f"{d.shape}. Make it again."
        )
    return {**arrays, "y": y.astype(np.int64), "d": d.astype(np.int64), "path": path}


def _features(arrays: dict[str, Any], width: int) -> np.ndarray:
    x, n = arrays["x"], len(arrays["y"])
    if x.shape != (n, width) or x.dtype.kind != "f":
        raise ValueError(
            f"{arrays['path']}: expected x float ({n}, {width}), got {x.dtype} {x.shape}. Make it "
            "again."
        )
    return np.asarray(x, np.float32)


def _by_domain(x: Any, y: np.ndarray, d: np.ndarray, domains: int) -> list[Rows]:
    return [(x[d == k], y[d == k]) for k in range(domains)]


def _digits(data: Path | None, seed: int) -> list[Rows]:
    task = digits.rotated(seed, ANGLES)
    images = [x.flatten(1).numpy() for x in task.images]
    return [(x, y.numpy()) for x, y in zip(images, task.labels, strict=True)]


def _amazon(data: Path | None, seed: int) -> list[Rows]:
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    parts = ("data", "indices", "indptr", "shape")
    found = _arrays(AMAZON, data, 4, 2, *parts)
    counts = np.log1p(found["data"].astype(np.float32))
    indices, rows = found["indices"].astype(np.int32), found["indptr"].astype(np.int32)
    x = csr_matrix((counts, indices, rows), shape=tuple(found["shape"]))
    return _by_domain(x, found["y"], found["d"], 4)


def _pacs(data: Path | None, seed: int) -> list[Rows]:
    found = _arrays(PACS, data, 4, 7, "x")
    return _by_domain(_features(found, 512), found["y"], found["d"], 4)


def _wisdm(data: Path | None, seed: int) -> list[Rows]:
    found = _arrays(WISDM, data, 36, 6, "x")
    return _by_domain(_features(found, 43), found["y"], found["d"] % GROUPS, GROUPS)


def _heart(data: Path | None, seed: int) -> list[Rows]:
    found = _arrays(HEART, data, 4, 2, "x", "features")
    x = _features(found, 13).copy()
    cholesterol = found["features"].tolist().index("chol")
    x[x[:, cholesterol] == 0, cholesterol] = np.nan  # that is how its absence is written
    return _by_domain(x, found["y"], found["d"], 4)


def _gas(data: Path | None, seed: int) -> list[Rows]:
    found = _arrays(GAS, data, 8, 6, "x")
    x = _features(found, 128)
    return _by_domain(np.sign(x) * np.log1p(np.abs(x)), found["y"], found["d"], 8)


ANGLES = (0, 25, 50, 75)
GROUPS = 4  # of WISDM's people
AMAZON = "amazon_reviews/amazon_reviews.npz"
PACS = "pacs/pacs_squeezenet.npz"
WISDM = "wisdm/wisdm.npz"
HEART = "heart_disease/heart_disease.npz"
GAS = "gas_drift/gas_drift.npz"

DATASETS = {
    "digits": DataSet(
        "rotated digits",
        tuple(f"{angle}°" for angle in ANGLES),
        10,
        _digits,
        None,
        False,
        "scikit-learn's digits, 8x8 pixels, a quarter of them turned by each angle",
    ),
    "pacs": DataSet(
        "PACS features",
        ("art painting", "cartoon", "photo", "sketch"),
        7,
        _pacs,
        PACS,
        True,
        "PACS (Li et al., 2017), 512 mean-pooled features of a SqueezeNet trained on ImageNet",
    ),
    "amazon": DataSet(
        "Amazon reviews",
        ("books", "dvd", "electronics", "kitchen"),
        2,
        _amazon,
        AMAZON,
        False,
        "sentiment of product reviews (Blitzer et al., 2007), log(1 + count) of unigrams and "
        "bigrams",
        columns=500,
    ),
    "wisdm": DataSet(
        "WISDM",
        tuple(f"people {k + 1}, {k + 1 + GROUPS}, ..." for k in range(GROUPS)),
        6,
        _wisdm,
        WISDM,
        True,
        "activities of 36 people in four groups (Kwapisz et al., 2010), 43 statistics of a phone's "
        "accelerometer",
    ),
    "heart": DataSet(
        "heart disease",
        ("Cleveland", "Hungary", "Switzerland", "Virginia"),
        2,
        _heart,
        HEART,
        True,
        "patients of four hospitals (Janosi et al., UCI), 13 clinical features with gaps",
    ),
    "gas": DataSet(
        "gas drift",
        tuple(f"batch {k}" for k in (1, 2, 3, 4, 5, 6, 8, 9)),
        6,
        _gas,
        GAS,
        True,
        "six gases by 16 drifting sensors (Vergara et al., 2012), 8 batches, sign-log of 128 "
        "features",
    ),
}


@lru_cache(maxsize=1)
def rows_of(name: str, data: Path | None, seed: int) -> list[Rows]:
    """Return each domain's rows.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or not as described.
    """
    return DATASETS[name].read(data, seed)


def fingerprint(name: str, data: Path | None) -> str:
    """Return the fingerprint of a data set that is there.

    Raises:
        OSError: the file cannot be read.
    """
    file = DATASETS[name].file
    if file is None:
        return digits.fingerprint()
    assert data is not None
    return of_files([data / file])


def missing(name: str, data: Path | None) -> str | None:
    """Return in words why a data set is not there, or None if it is."""
    file = DATASETS[name].file
    if file is None or (data is not None and (data / file).is_file()):
        return None
    where = "FASTDG_DATA is not set" if data is None else f"there is no {data / file}"
    return f"{name}: skipped, {where}"
