from __future__ import annotations

from typing import Any

import numpy as np


def _hparams(algorithm: str, dataset: str, random_state: Any) -> dict[str, tuple[Any, Any]]:
    hparams = {"lr": (1e-2, 10 ** random_state.uniform(-4.5, -2.5))}
    if algorithm == "GroupDRO":
        hparams["groupdro_eta"] = (0.5, 10 ** random_state.uniform(-3, -1))
    return hparams


def default_hparams(algorithm: str, dataset: str) -> dict[str, Any]:
    dummy = np.random.RandomState(0)
    return {a: b for a, (b, c) in _hparams(algorithm, dataset, dummy).items()}


def random_hparams(algorithm: str, dataset: str, seed: int) -> dict[str, Any]:
    random_state = np.random.RandomState(seed)
    return {a: c for a, (b, c) in _hparams(algorithm, dataset, random_state).items()}
