"""Which algorithms of DomainBed fastdg is behind, which it adds, and their hyper-parameters."""

from __future__ import annotations

from functools import partial

from ..algorithms.agr_rand import AgrRand
from ..algorithms.and_mask import ANDMask
from ..algorithms.ascent.disam import DISAM
from ..algorithms.ascent.gam import GAM
from ..algorithms.ascent.gsam import GSAM
from ..algorithms.ascent.sagm import SAGM
from ..algorithms.ascent.sam import SAM
from ..algorithms.features.caus_irl import CausIRL
from ..algorithms.features.coral import CORAL
from ..algorithms.features.ib_erm import IBERM
from ..algorithms.features.ib_irm import IBIRM
from ..algorithms.features.mmd import MMD
from ..algorithms.gga_l import GGAL
from ..algorithms.gram.balanced import IMTLG, AlignedMTL, ConFIG
from ..algorithms.gram.cone import DualProj, UPGrad
from ..algorithms.gram.fair import FairGrad, NashMTL
from ..algorithms.gram.hull import MGDA, CAGrad
from ..algorithms.gram.vaccine import GradVac
from ..algorithms.group_dro import GroupDRO
from ..algorithms.iga import IGA
from ..algorithms.inner_loops.fish import Fish
from ..algorithms.inner_loops.pogm import POGM
from ..algorithms.irm import IRM
from ..algorithms.pcgrad import PCGrad
from ..algorithms.risks.eqrm import EQRM
from ..algorithms.risks.rdm import RDM
from ..algorithms.risks.sd import SD
from ..algorithms.sand_mask import SANDMask
from ..algorithms.sma import SMA
from ..algorithms.vrex import VREx
from .adapter import Entry
from .adapters import (
    FeatureAdapter,
    FishAdapter,
    FishrAdapter,
    PGradAdapter,
    POGMAdapter,
    SMAAdapter,
)
from .makers import agr_sum, drawing, fishr, genie, gga, miro, mldg, pgrad, wrapped
from .rise import RISEAdapter, rise

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
    "GENIE": Entry("ERM", genie, {"loss": "loss"}, together=True),
    "GGA": Entry("ERM", gga, CONFLICTS, together=True),
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
