"""Makers of fastdg's wrappers from DomainBed's hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..algorithms.agr_sum import AgrSum
from ..algorithms.ascent.mldg import MLDG
from ..algorithms.fishr import Fishr
from ..algorithms.genie import GENIE
from ..algorithms.gga import GGA
from ..algorithms.inner_loops.pgrad import PGrad
from ..algorithms.miro import MIRO
from ..core.optimizer import DomainOptimizer

# The featurizers that MIRO has no preset for -> their layers
MIRO_LAYERS = {
    "MNIST_CNN": ("bn0", "bn1", "bn2", "bn3"),
    "Wide_ResNet": ("block1", "block2", "block3"),
}


def wrapped(wrapper: Callable[..., DomainOptimizer], **settings: str) -> Callable[[Any], Any]:
    """Return a maker of the wrapper that takes each setting from its hyper-parameter."""

    def wrap(algorithm: Any) -> DomainOptimizer:
        given = {name: algorithm.hparams[hparam] for name, hparam in settings.items()}
        return wrapper(
            algorithm.optimizer,
            num_domains=algorithm.num_domains,
            model=algorithm.network,
            **given,
        )

    return wrap


def own_generator(algorithm: Any, device: str | None = None) -> torch.Generator:
    """With the seed of the run; on the device of the network by default."""
    where = device or next(algorithm.network.parameters()).device
    return torch.Generator(where).manual_seed(torch.initial_seed())


def drawing(
    wrapper: Callable[..., DomainOptimizer], device: str | None, fixed: Any = None, **settings: str
) -> Callable[[Any], Any]:
    """Return a maker of the wrapper with a generator of its own: the data then come in the same
    order as for algorithms that draw no random numbers.

    Args:
        device: of the generator; None: that of the parameters.
        fixed: arguments that no hyper-parameter has; None: the scale of the surgery's papers.
        settings: argument -> its hyper-parameter.
    """

    def wrap(algorithm: Any) -> DomainOptimizer:
        return wrapper(
            algorithm.optimizer,
            generator=own_generator(algorithm, device),
            num_domains=algorithm.num_domains,
            model=algorithm.network,
            **({"reduction": "sum"} if fixed is None else fixed),
            **{name: algorithm.hparams[hparam] for name, hparam in settings.items()},
        )

    return wrap


def fishr(algorithm: Any) -> Fishr:
    hparams = algorithm.hparams
    return Fishr(
        algorithm.optimizer,
        params=list(algorithm.classifier.parameters()),
        penalty_weight=hparams["lambda"],
        anneal_steps=hparams["penalty_anneal_iters"],
        ema=hparams["ema"],
        num_domains=algorithm.num_domains,
        model=algorithm.network,
    )


def agr_sum(algorithm: Any) -> AgrSum:
    return AgrSum(
        algorithm.optimizer,
        reduction="sum",
        num_domains=algorithm.num_domains,
        model=algorithm.network,
    )


def mldg(algorithm: Any) -> MLDG:
    domains = algorithm.num_domains
    # With no domain to train on, DomainBed makes steps of zeros
    tests = min(int(algorithm.hparams["n_meta_test"]), domains - 1)
    beta = algorithm.hparams["mldg_beta"]
    return MLDG(
        algorithm.optimizer,
        beta=beta,
        meta_test=tests,
        num_domains=domains,
        model=algorithm.network,
    )


def pgrad(algorithm: Any) -> PGrad:
    for group in algorithm.optimizer.param_groups:
        group["weight_decay"] = 0.0  # of the authors' inner steps
    return PGrad(
        algorithm.optimizer,
        meta_lr=algorithm.hparams["pgrad_meta_lr"],
        weight_decay=algorithm.optimizer.defaults["weight_decay"],
        generator=own_generator(algorithm, "cpu"),
        num_domains=algorithm.num_domains,
        model=algorithm.network,
    )


def genie(algorithm: Any) -> GENIE:
    # In place of Adam, which would divide by the gradients' size again
    rate, decay = algorithm.hparams["genie_rate"], algorithm.optimizer.defaults["weight_decay"]
    parameters = algorithm.network.parameters()
    algorithm.optimizer = torch.optim.SGD(parameters, lr=rate)
    return GENIE(
        algorithm.optimizer,
        dropped=algorithm.hparams["genie_dropped"],
        weight_decay=decay,
        generator=own_generator(algorithm),
        num_domains=algorithm.num_domains,
        model=algorithm.network,
    )


def gga(algorithm: Any) -> GGA:
    return GGA(
        algorithm.optimizer,
        size=algorithm.hparams["gga_size"],
        featurizer=algorithm.featurizer,
        generator=own_generator(algorithm),
        num_domains=algorithm.num_domains,
        model=algorithm.network,
    )


def miro(algorithm: Any) -> MIRO:
    names = MIRO_LAYERS.get(type(algorithm.featurizer).__name__)
    return MIRO(
        algorithm.optimizer,
        algorithm.network,
        layers=[f"0.{name}" for name in names] if names is not None else None,
        weight=algorithm.hparams["miro_lambda"],
        lr_multiplier=algorithm.hparams["miro_lr_mult"],
        num_domains=algorithm.num_domains,
    )
