from __future__ import annotations

from typing import Any

import numpy as np

from domainbed.lib import misc

IB: dict[str, Any] = {
    "ib_lambda": (100.0, lambda r: 10 ** r.uniform(-1, 5)),
    "ib_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
}
RANGES: dict[str, dict[str, Any]] = {
    "Fish": {"meta_lr": (0.5, lambda r: float(r.choice([0.05, 0.1, 0.5])))},
    "IRM": {
        "irm_lambda": (100.0, lambda r: 10 ** r.uniform(-1, 5)),
        "irm_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
    },
    "VREx": {
        "vrex_lambda": (10.0, lambda r: 10 ** r.uniform(-1, 5)),
        "vrex_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
    },
    "GroupDRO": {"groupdro_eta": (0.01, lambda r: 10 ** r.uniform(-3, -1))},
    "ANDMask": {"tau": (1, lambda r: r.uniform(0.5, 1.0))},
    "SANDMask": {
        "tau": (1.0, lambda r: r.uniform(0.0, 1.0)),
        "k": (10.0, lambda r: 10 ** r.uniform(-3, 5)),
    },
    "IGA": {"penalty": (1000, lambda r: 10 ** r.uniform(1, 5))},
    "SD": {"sd_reg": (0.1, lambda r: 10 ** r.uniform(-5, -1))},
    "CORAL": {"mmd_gamma": (1.0, lambda r: 10 ** r.uniform(-1, 1))},
    "MMD": {"mmd_gamma": (1.0, lambda r: 10 ** r.uniform(-1, 1))},
    "CausIRL_CORAL": {"mmd_gamma": (1.0, lambda r: 10 ** r.uniform(-1, 1))},
    "CausIRL_MMD": {"mmd_gamma": (1.0, lambda r: 10 ** r.uniform(-1, 1))},
    "MLDG": {
        "mldg_beta": (1.0, lambda r: 10 ** r.uniform(-1, 1)),
        "n_meta_test": (2, lambda r: int(r.choice([1, 2]))),
    },
    "IB_ERM": IB,
    "IB_IRM": {
        **IB,
        "irm_lambda": (100.0, lambda r: 10 ** r.uniform(-1, 5)),
        "irm_penalty_anneal_iters": (500, lambda r: int(10 ** r.uniform(0, 4))),
    },
    "EQRM": {
        "eqrm_quantile": (0.75, lambda r: r.uniform(0.5, 0.99)),
        "eqrm_burnin_iters": (2500, lambda r: 10 ** r.uniform(2.5, 3.5)),
        "eqrm_lr": (1e-6, lambda r: 10 ** r.uniform(-7, -5)),
    },
    "RDM": {
        "rdm_lambda": (5.0, lambda r: r.uniform(0.1, 10.0)),
        "rdm_penalty_anneal_iters": (1500, lambda r: int(r.uniform(800, 2700))),
        "variance_weight": (0.004, lambda r: r.uniform(0.001, 0.007)),
        "rdm_lr": (1.5e-5, lambda r: r.uniform(8e-6, 2e-5)),
    },
    "Fishr": {
        "lambda": (1000.0, lambda r: 10 ** r.uniform(1.0, 4.0)),
        "penalty_anneal_iters": (1500, lambda r: int(r.uniform(0.0, 5000.0))),
        "ema": (0.95, lambda r: r.uniform(0.90, 0.99)),
    },
}
GENERIC: dict[str, Any] = {
    "lr": (1e-3, lambda r: 10 ** r.uniform(-4.5, -2.5)),
    "weight_decay": (0.0, lambda r: 0.0),
    "batch_size": (8, lambda r: int(2 ** r.uniform(2, 4))),
}


def _hparams(algorithm: str, dataset: str, random_seed: int) -> dict[str, tuple[Any, Any]]:
    ranges = {**GENERIC, **RANGES.get(algorithm, {})}
    return {
        name: (default, draw(np.random.RandomState(misc.seed_hash(random_seed, name))))
        for name, (default, draw) in ranges.items()
    }


def default_hparams(algorithm: str, dataset: str) -> dict[str, Any]:
    return {name: pair[0] for name, pair in _hparams(algorithm, dataset, 0).items()}


def random_hparams(algorithm: str, dataset: str, seed: int) -> dict[str, Any]:
    return {name: pair[1] for name, pair in _hparams(algorithm, dataset, seed).items()}
