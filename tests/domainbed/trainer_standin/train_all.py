"""A trainer with the calls of SWAD's: batches as a dict of lists, evaluation by `predict`, averages
of deep copies; results of each algorithm as a line of JSON."""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import numpy as np
import torch
from domainbed import algorithms, hparams_registry
from torch.nn import functional as F

DOMAINS, BATCH, FEATURES, CLASSES = 3, 6, 5, 3


def batches(steps: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    sizes = np.full([DOMAINS], BATCH, dtype=np.int)  # as the clones do, whatever NumPy
    for _ in range(steps):
        x = [torch.randn(n, FEATURES, generator=generator) + d for d, n in enumerate(sizes)]
        y = [torch.randint(CLASSES, (n,), generator=generator) for n in sizes.tolist()]
        yield {"x": x, "y": y, "x2": x}


def train(name: str, steps: int, hparams: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    kind = algorithms.get_algorithm_class(name)
    algorithm = kind((FEATURES,), CLASSES, DOMAINS, hparams)
    averaged, logged = copy.deepcopy(algorithm), []
    for step, batch in enumerate(batches(steps)):
        logged.append(algorithm.update(**batch, step=step))
        for mean, p in zip(averaged.parameters(), algorithm.parameters(), strict=True):
            mean.detach().lerp_(p.detach(), 1 / (step + 2))
        if step == steps // 2:
            algorithm = algorithm.clone()
    algorithm.eval()
    x, y = (torch.cat(parts) for parts in (batch["x"], batch["y"]))
    with torch.no_grad():
        loss = F.cross_entropy(algorithm.predict(x), y).item()
        mean_loss = F.cross_entropy(averaged.predict(x), y).item()
    flat = torch.cat([p.detach().flatten() for p in algorithm.parameters()]).tolist()
    return {"name": name, "logged": logged, "loss": loss, "averaged": mean_loss, "weights": flat}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", action="append")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    for name in arguments.algorithm:
        hparams = hparams_registry.default_hparams(name, "PACS")
        drawn = hparams_registry.random_hparams(name, "PACS", 3)
        assert hparams.keys() == drawn.keys()
        found = train(name, arguments.steps, hparams)
        print(json.dumps({**found, "hparams": {k: repr(v) for k, v in hparams.items()}}))
