"""Hyper-parameters of the algorithms that DomainBed does not have: defaults and search ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..text import PHOTOS

Draw = Callable[[np.random.RandomState], Any]
CLIP = "openai/clip-vit-base-patch16"


def _choice(default: Any, *values: Any) -> tuple[Any, Draw]:
    return default, lambda r: type(default)(r.choice(values))


_RHO = {"sam_rho": _choice(0.05, 0.01, 0.02, 0.05, 0.1)}
# POGM and MIRO have the ranges of their papers or code; the other ranges are ours, around the
# papers' values. Gradient surgery has none of its own
SEARCHES: dict[str, Mapping[str, tuple[Any, Draw]]] = {
    "CAGrad": {"cagrad_c": _choice(0.5, 0.2, 0.4, 0.5, 0.8)},
    "FairGrad": {"fairgrad_alpha": _choice(1.0, 0.5, 1.0, 2.0, 5.0)},
    "GGAL": {"gga_l_gamma": _choice(0.001, 0.0001, 0.001, 0.01)},
    "GradVac": {"gradvac_beta": _choice(0.5, 0.01, 0.1, 0.5)},
    "POGM": {
        "meta_lr": _choice(0.5, 0.05, 0.1, 0.5),
        "cagrad_c": _choice(0.5, 0.05, 0.1, 0.5),
        "cag_update": _choice(1, 1, 5, 10),
    },
    "MIRO": {
        "miro_lambda": _choice(0.1, 1.0, 0.1, 0.01, 0.001),
        "miro_lr_mult": (10.0, lambda r: 10.0),
    },
    "SMA": {"sma_start": _choice(100, 100, 300, 600)},
    "SAM": _RHO,
    "GSAM": {**_RHO, "gsam_alpha": _choice(0.2, 0.05, 0.1, 0.2, 0.4)},
    "SAGM": {**_RHO, "sagm_alpha": _choice(0.001, 0.0005, 0.001)},
    "GAM": {
        "gam_grad_rho": _choice(0.02, 0.02, 0.05),
        "gam_grad_norm_rho": _choice(0.2, 0.1, 0.2),
    },
    "DISAM": {**_RHO, "disam_lambda": _choice(0.1, 0.01, 0.1, 1.0)},
}


def hparams_of(algorithm: str, dataset: str) -> Mapping[str, tuple[Any, Draw]]:
    """Default and random search of the hyper-parameters that DomainBed does not know of."""
    if algorithm != "RISE":
        return SEARCHES.get(algorithm, {})
    # The search range of RISE's paper
    kd = {"OfficeHome": (0.2, 0.1), "TerraIncognita": (0.2, 0.3)}.get(dataset, (0.9, 0.8))
    return {
        "rise_distillation": (kd[0], lambda r: float(r.choice(kd))),
        "rise_distance": _choice(1.0, 0.5, 1.0, 2.0),
        "rise_temperature": (3.0, lambda r: 3.0),
        "rise_clip": (CLIP, lambda r: CLIP),
        "rise_classes": ([], lambda r: []),
        "rise_anchors": (list(PHOTOS), lambda r: list(PHOTOS)),
    }
