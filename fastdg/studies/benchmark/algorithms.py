"""The algorithms of the benchmark: the demo's, as `fastdg.domainbed` sets them up and searches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from ... import ERM, GGA, RISE, SWAD
from ...domainbed.adapter import Entry
from ...domainbed.algorithms import ENTRIES
from ...domainbed.hparams import DOMAINBED, SEARCHES, Draw
from ...domainbed.makers import wrapped
from ..experiments import settings
from .folds import seed_of

WIDTH = 32  # of the hidden layer
DIGITS = 4  # of a hyper-parameter that was drawn
# DomainBed's default values, to which those of its steps and learning rates are related
DOMAINBED_STEPS, DOMAINBED_LR = 5000, 5e-5
# All algorithms search these, in DomainBed's ranges but for the learning rate: networks this small
# are trained in some 60 steps, not thousands
SHARED: Mapping[str, tuple[Any, Draw]] = {
    "lr": (1e-2, lambda r: 10 ** r.uniform(-3, -1.5)),
    "weight_decay": (0.0, lambda r: 10 ** r.uniform(-6, -2)),
    "batch_size": (32, lambda r: int(2 ** r.uniform(3, 5.5))),  # of each training domain
}
# Weights of penalties on gradients, losses and features, and their size here over DomainBed's: with
# its own, which are for thousands of small steps, none of them lets a network learn in 60 steps
WEIGHTS = ("lambda", "irm_lambda", "vrex_lambda", "penalty", "ib_lambda")
WEIGHT = 1e-3
RATES = ("eqrm_lr", "rdm_lr")  # learning rates after an anneal
AGAIN = "erm-again"


class Perceptron(nn.Module):
    """A network of one hidden layer, and Adam, with the attributes of DomainBed's ERM."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        num_domains: int,
        hparams: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.input_shape, self.hparams = input_shape, hparams
        self.featurizer = nn.Sequential(nn.Linear(input_shape[0], WIDTH), nn.ReLU())
        self.classifier = nn.Linear(WIDTH, num_classes)
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )


@dataclass(frozen=True)
class Contender:
    """An algorithm of the benchmark.

    Attributes:
        title: in tables and figures.
        entry: how `fastdg.domainbed` makes its wrapper and its steps.
        searched: its own hyper-parameters, name -> default and random search.
        again: whether it has random numbers of its own, where all others share theirs.
    """

    title: str
    entry: Entry
    searched: Mapping[str, tuple[Any, Draw]]
    again: bool = False

    def network(self, features: int, classes: int, domains: int, hparams: Mapping[str, Any]) -> Any:
        """Return a network whose ``update`` makes a step of the algorithm."""
        kind = type("Contender", (self.entry.adapter, Perceptron), {"entry": self.entry})
        return kind((features,), classes, domains, hparams)


def _whole(entry: Entry) -> Entry:
    """Return the entry with all layers in place of the head."""

    def wrap(adapter: Any) -> Any:
        return entry.wrap(
            SimpleNamespace(
                optimizer=adapter.optimizer,
                classifier=adapter.network,
                network=adapter.network,
                hparams=adapter.hparams,
                num_domains=adapter.num_domains,
            )
        )

    return replace(entry, wrap=wrap)


# GGA's window of steps, which DomainBed's names do not have
WINDOW = {"gga_start_iters": (100, lambda r: 100), "gga_end_iters": (200, lambda r: 200)}


def _windowed(entry: Entry) -> Entry:
    def wrap(adapter: Any) -> Any:
        opt: Any = entry.wrap(adapter)
        opt.start, opt.end = (adapter.hparams[name] for name in WINDOW)
        return opt

    return replace(entry, wrap=wrap)


def _contender(algorithm: settings.Algorithm) -> Contender:
    wrapper = algorithm.wrapper or ERM
    if wrapper is ERM:
        return Contender(algorithm.title, Entry("ERM", wrapped(ERM), {"loss": "loss"}), {})
    if wrapper is SWAD:  # which DomainBed's trainer does not evaluate
        return Contender(algorithm.title, Entry("ERM", wrapped(SWAD), {"loss": "loss"}), {})
    name = algorithm.domainbed or wrapper.__name__
    entry = ENTRIES[name]
    if algorithm.given.get("params") == "all":
        entry = _whole(entry)
    searched = {**DOMAINBED.get(name, {}), **SEARCHES.get(name, {})}
    if wrapper is GGA:
        entry, searched = _windowed(entry), {**searched, **WINDOW}
    return Contender(algorithm.title, entry, searched)


# Without those that need a pre-trained network or texts
CONTENDERS = {
    name: _contender(algorithm)
    for name, algorithm in settings.ALGORITHMS.items()
    if not algorithm.pretrained and algorithm.wrapper is not RISE
}
CONTENDERS[AGAIN] = replace(CONTENDERS["erm"], title="ERM, drawn anew", again=True)


def hparams_of(algorithm: str, trial: int, steps: int, *of: Any) -> dict[str, Any]:
    """Return the hyper-parameters of a trial.

    Trial 0 has the defaults. In the others each value is drawn from a seed of its name, ``trial``
    and ``of`` (data set, domain left out and seed): algorithms that search the same
    hyper-parameter draw the same values, so that they are compared at the same learning rates.

    Steps after which a penalty or an average begins, ``..._iters`` and ``..._start``, are scaled
    from DomainBed's 5,000 to ``steps``; learning rates after that, `RATES`, from DomainBed's 5e-5
    to this trial's. Penalties whose weights DomainBed counts in hundreds, `WEIGHTS`, have a
    thousandth of them.
    """
    contender = CONTENDERS[algorithm]
    more = (algorithm,) if contender.again else ()
    found: dict[str, Any] = {}
    for name, (default, draw) in {**SHARED, **contender.searched}.items():
        value = default
        if trial:
            value = draw(np.random.RandomState(seed_of("search", *of, trial, name, *more)))
        if name.endswith("_iters"):
            value = round(value * steps / DOMAINBED_STEPS)
        elif name.endswith("_start"):
            value = max(1, round(value * steps / DOMAINBED_STEPS))
        elif name in RATES:
            value = value / DOMAINBED_LR * found["lr"]
        elif name in WEIGHTS:
            value = value * WEIGHT
        found[name] = float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
    return found
