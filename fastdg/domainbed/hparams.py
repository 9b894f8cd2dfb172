"""Hyper-parameters of the algorithms: defaults and search ranges."""

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
    "GENIE": {
        "genie_rate": _choice(0.015, 0.005, 0.015, 0.05),
        "genie_dropped": _choice(0.4, 0.2, 0.4, 0.6),
    },
    "GGA": {"gga_size": _choice(1e-5, 1e-6, 1e-5, 1e-4)},
    "GGAL": {"gga_l_gamma": _choice(0.001, 0.0001, 0.001, 0.01)},
    "GradVac": {"gradvac_beta": _choice(0.5, 0.01, 0.1, 0.5)},
    # DomainBed's own, as an int that its result files can have
    "MLDG": {"n_meta_test": _choice(2, 1, 2)},
    "POGM": {
        "meta_lr": _choice(0.5, 0.05, 0.1, 0.5),
        "cagrad_c": _choice(0.5, 0.05, 0.1, 0.5),
        "cag_update": _choice(1, 1, 5, 10),
    },
    "PGrad": {"pgrad_meta_lr": _choice(0.1, 0.05, 0.1, 0.2)},
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


def _power(default: float, low: float, high: float) -> tuple[float, Draw]:
    """10 to a uniform power."""
    return default, lambda r: float(10 ** r.uniform(low, high))


def _power_of_steps(default: int, low: float, high: float) -> tuple[int, Draw]:
    return default, lambda r: int(10 ** r.uniform(low, high))


def _uniform(default: float, low: float, high: float) -> tuple[float, Draw]:
    return default, lambda r: float(r.uniform(low, high))


_IRM = {
    "irm_lambda": _power(100.0, -1, 5),
    "irm_penalty_anneal_iters": _power_of_steps(500, 0, 4),
}
_IB = {"ib_lambda": _power(100.0, -1, 5), "ib_penalty_anneal_iters": _power_of_steps(500, 0, 4)}
_GAMMA = {"mmd_gamma": _power(1.0, -1, 1)}
# DomainBed's own, for its 5,000 steps, where there is no DomainBed; its plug takes DomainBed's
DOMAINBED: dict[str, Mapping[str, tuple[Any, Draw]]] = {
    "Fishr": {
        "lambda": _power(1000.0, 1, 4),
        "penalty_anneal_iters": (1500, lambda r: int(r.uniform(0.0, 5000.0))),
        "ema": _uniform(0.95, 0.90, 0.99),
    },
    "Fish": {"meta_lr": _choice(0.5, 0.05, 0.1, 0.5)},
    "IRM": _IRM,
    "VREx": {
        "vrex_lambda": _power(10.0, -1, 5),
        "vrex_penalty_anneal_iters": _power_of_steps(500, 0, 4),
    },
    "GroupDRO": {"groupdro_eta": _power(0.01, -3, -1)},
    "ANDMask": {"tau": _uniform(1.0, 0.5, 1.0)},
    "SANDMask": {"tau": _uniform(1.0, 0.0, 1.0), "k": _power(10.0, -3, 5)},
    "IGA": {"penalty": _power(1000.0, 1, 5)},
    "EQRM": {
        "eqrm_quantile": _uniform(0.75, 0.5, 0.99),
        "eqrm_burnin_iters": (2500, lambda r: 10 ** r.uniform(2.5, 3.5)),
        "eqrm_lr": _power(1e-6, -7, -5),
    },
    "RDM": {
        "rdm_lambda": _uniform(5.0, 0.1, 10.0),
        "rdm_penalty_anneal_iters": (1500, lambda r: int(r.uniform(800.0, 2700.0))),
        "variance_weight": _uniform(0.004, 0.001, 0.007),
        "rdm_lr": _uniform(1.5e-5, 8e-6, 2e-5),
    },
    "SD": {"sd_reg": _power(0.1, -5, -1)},
    "CORAL": _GAMMA,
    "MMD": _GAMMA,
    "CausIRL_CORAL": _GAMMA,
    "CausIRL_MMD": _GAMMA,
    "MLDG": {"mldg_beta": _power(1.0, -1, 1)},
    "IB_ERM": _IB,
    "IB_IRM": {**_IRM, **_IB},
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
