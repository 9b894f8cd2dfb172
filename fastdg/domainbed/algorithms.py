"""Which algorithms of DomainBed fastdg is behind, which it adds, and their hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..algorithms.agr_rand import AgrRand
from ..algorithms.agr_sum import AgrSum
from ..algorithms.and_mask import ANDMask
from ..algorithms.ascent.disam import DISAM
from ..algorithms.ascent.gam import GAM
from ..algorithms.ascent.gsam import GSAM
from ..algorithms.ascent.mldg import MLDG
from ..algorithms.ascent.sagm import SAGM
from ..algorithms.ascent.sam import SAM
from ..algorithms.features.caus_irl import CausIRL
from ..algorithms.features.coral import CORAL
from ..algorithms.features.ib_erm import IBERM
from ..algorithms.features.ib_irm import IBIRM
from ..algorithms.features.mmd import MMD
from ..algorithms.fishr import Fishr
from ..algorithms.gga_l import GGAL
from ..algorithms.gram.balanced import IMTLG, AlignedMTL, ConFIG
from ..algorithms.gram.cone import DualProj, UPGrad
from ..algorithms.gram.fair import FairGrad, NashMTL
from ..algorithms.gram.hull import MGDA, CAGrad
from ..algorithms.gram.vaccine import GradVac
from ..algorithms.group_dro import GroupDRO
from ..algorithms.iga import IGA
from ..algorithms.irm import IRM
from ..algorithms.miro import MIRO
from ..algorithms.pcgrad import PCGrad
from ..algorithms.risks.eqrm import EQRM
from ..algorithms.risks.rdm import RDM
from ..algorithms.risks.sd import SD
from ..algorithms.sand_mask import SANDMask
from ..algorithms.sma import SMA
from ..algorithms.trajectories.fish import Fish
from ..algorithms.trajectories.pgrad import PGrad
from ..algorithms.trajectories.pogm import POGM
from ..algorithms.vrex import VREx
from ..core.optimizer import DomainOptimizer
from .adapter import Entry
from .adapters import (
    FeatureAdapter,
    FishAdapter,
    FishrAdapter,
    PGradAdapter,
    POGMAdapter,
    SMAAdapter,
)
from .rise import RISEAdapter, rise

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
        where = device or next(algorithm.network.parameters()).device
        return wrapper(
            algorithm.optimizer,
            generator=torch.Generator(where).manual_seed(torch.initial_seed()),
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
        generator=torch.Generator().manual_seed(torch.initial_seed()),
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


PENALTY = {"loss": "objective", "nll": "loss", "penalty": "penalty"}
AGREEMENT = {"loss": "loss", "agreeing": "agreeing"}
SHARPNESS = {"loss": "loss", "ascended_loss": "ascended_loss"}
CONFLICTS = {"loss": "loss", "conflicts": "conflicts"}
TEXTS = ("rise_absolute", "rise_relative", "rise_distillation")

ENTRIES = {
    "Fishr": Entry("ERM", fishr, PENALTY, together=True, adapter=FishrAdapter),
    "Fish": Entry(
        "Fish",
        wrapped(Fish, meta_lr="meta_lr"),
        {"loss": "last"},
        alone=True,
        asks=True,
        adapter=FishAdapter,
    ),
    "IRM": Entry(
        "IRM",
        wrapped(IRM, penalty_weight="irm_lambda", anneal_steps="irm_penalty_anneal_iters"),
        PENALTY,
        together=True,
    ),
    "VREx": Entry(
        "VREx",
        wrapped(VREx, penalty_weight="vrex_lambda", anneal_steps="vrex_penalty_anneal_iters"),
        {**PENALTY, "nll": "last"},
        together=True,
    ),
    "GroupDRO": Entry("GroupDRO", wrapped(GroupDRO, eta="groupdro_eta"), {"loss": "objective"}),
    "ANDMask": Entry("ANDMask", wrapped(ANDMask, threshold="tau"), {"loss": "loss"}),
    "SANDMask": Entry(
        "SANDMask", wrapped(SANDMask, threshold="tau", steepness="k"), {"loss": "loss"}
    ),
    "IGA": Entry(
        "IGA",
        wrapped(IGA, penalty_weight="penalty"),
        {"loss": "loss", "penalty": "penalty"},
        asks=True,
    ),
    # Not in DomainBed
    "AgrSum": Entry("ERM", agr_sum, AGREEMENT),
    "AgrRand": Entry("ERM", drawing(AgrRand, None), AGREEMENT),
    "PCGrad": Entry("ERM", drawing(PCGrad, "cpu"), CONFLICTS),
    "CAGrad": Entry("ERM", wrapped(CAGrad, c="cagrad_c"), CONFLICTS),
    "FairGrad": Entry("ERM", wrapped(FairGrad, alpha="fairgrad_alpha"), CONFLICTS),
    "GGAL": Entry("ERM", drawing(GGAL, None, {}, gamma="gga_l_gamma"), CONFLICTS),
    "GradVac": Entry("ERM", drawing(GradVac, "cpu", beta="gradvac_beta"), CONFLICTS),
    **{
        rule.__name__: Entry("ERM", wrapped(rule), CONFLICTS)
        for rule in (MGDA, UPGrad, DualProj, IMTLG, AlignedMTL, ConFIG, NashMTL)
    },
    "POGM": Entry(
        "ERM",
        wrapped(POGM, meta_lr="meta_lr", c="cagrad_c", domain_steps="cag_update"),
        {"loss": "last"},
        alone=True,
        asks=True,
        adapter=POGMAdapter,
    ),
    "PGrad": Entry("ERM", pgrad, {"loss": "loss"}, alone=True, asks=True, adapter=PGradAdapter),
    "SMA": Entry(
        "ERM",
        wrapped(SMA, start="sma_start"),
        {"loss": "loss"},
        together=True,
        adapter=SMAAdapter,
    ),
    "MIRO": Entry("ERM", miro, {"loss": "objective", "nll": "loss", "miro": "miro"}, together=True),
    "RISE": Entry(
        "ERM",
        rise,
        {"loss": "objective", **{name: name for name in TEXTS}},
        together=True,
        adapter=RISEAdapter,
    ),
}

IB = {"penalty_weight": "ib_lambda", "anneal_steps": "ib_penalty_anneal_iters"}
IB_IRM = {
    "penalty_weight": "irm_lambda",
    "anneal_steps": "irm_penalty_anneal_iters",
    "bottleneck_weight": "ib_lambda",
    "bottleneck_anneal_steps": "ib_penalty_anneal_iters",
}
ENTRIES |= {
    "EQRM": Entry(
        "EQRM",
        wrapped(
            partial(EQRM, gradient="domainbed"),
            quantile="eqrm_quantile",
            anneal_steps="eqrm_burnin_iters",
            lr_after_anneal="eqrm_lr",
        ),
        {"loss": "objective"},
    ),
    "RDM": Entry(
        "RDM",
        wrapped(
            RDM,
            penalty_weight="rdm_lambda",
            variance_weight="variance_weight",
            anneal_steps="rdm_penalty_anneal_iters",
            lr_after_anneal="rdm_lr",
        ),
        {
            "loss": "objective",
            "total_loss": "objective",
            "erm_loss": "loss",
            "matching_penalty": "penalty",
            "variance_penalty": "variance",
        },
        together=True,
    ),
    "SD": Entry(
        "SD",
        wrapped(SD, penalty_weight="sd_reg"),
        {"loss": "loss", "penalty": "sd"},
        together=True,
        adapter=FeatureAdapter,
    ),
    **{
        name: Entry(
            name,
            wrapped(kind, penalty_weight="mmd_gamma"),
            {"loss": "loss", "penalty": "penalty"},
            adapter=FeatureAdapter,
        )
        for name, kind in (("CORAL", CORAL), ("MMD", MMD))
    },
    **{
        f"CausIRL_{distance.upper()}": Entry(
            f"CausIRL_{distance.upper()}",
            drawing(CausIRL, "cpu", {"distance": distance}, penalty_weight="mmd_gamma"),
            {"loss": "loss", "penalty": "penalty"},
            adapter=FeatureAdapter,
        )
        for distance in ("coral", "mmd")
    },
    "IB_ERM": Entry(
        "IB_ERM",
        wrapped(IBERM, **IB),
        {"loss": "objective", "nll": "loss", "IB_penalty": "penalty"},
        together=True,
        adapter=FeatureAdapter,
    ),
    "IB_IRM": Entry(
        "IB_IRM",
        wrapped(IBIRM, **IB_IRM),
        {
            "loss": "objective",
            "nll": "loss",
            "IRM_penalty": "penalty",
            "IB_penalty": "bottleneck",
        },
        together=True,
        adapter=FeatureAdapter,
    ),
}
ENTRIES["MLDG"] = Entry("MLDG", mldg, {"loss": "objective"}, alone=True, asks=True)
RHO = {"rho": "sam_rho"}
ENTRIES |= {
    name: Entry("ERM", wrapped(kind, **settings), SHARPNESS, together=True)
    for name, kind, settings in (
        ("SAM", SAM, RHO),
        ("GSAM", GSAM, {**RHO, "alpha": "gsam_alpha"}),
        ("SAGM", SAGM, {**RHO, "alpha": "sagm_alpha"}),
        ("GAM", GAM, {"grad_rho": "gam_grad_rho", "grad_norm_rho": "gam_grad_norm_rho"}),
        ("DISAM", DISAM, {**RHO, "variance_weight": "disam_lambda"}),
    )
}
