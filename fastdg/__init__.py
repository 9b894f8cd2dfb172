"""fastdg: gradient statistics and algorithms for domain generalisation, at nearly the price of
plain training."""

from . import func, ops, weightings
from .algorithms.agr_rand import AgrRand
from .algorithms.agr_sum import AgrSum
from .algorithms.and_mask import ANDMask
from .algorithms.ascent.disam import DISAM
from .algorithms.ascent.gam import GAM
from .algorithms.ascent.gsam import GSAM
from .algorithms.ascent.mldg import MLDG
from .algorithms.ascent.sagm import SAGM
from .algorithms.ascent.sam import SAM
from .algorithms.erm import ERM
from .algorithms.features.caus_irl import CausIRL
from .algorithms.features.coral import CORAL
from .algorithms.features.ib_erm import IBERM
from .algorithms.features.ib_irm import IBIRM
from .algorithms.features.mmd import MMD
from .algorithms.fishr import Fishr
from .algorithms.genie import GENIE
from .algorithms.gga import GGA
from .algorithms.gga_l import GGAL
from .algorithms.gram.balanced import IMTLG, AlignedMTL, ConFIG
from .algorithms.gram.cone import DualProj, UPGrad
from .algorithms.gram.fair import FairGrad, NashMTL
from .algorithms.gram.hull import MGDA, CAGrad
from .algorithms.gram.vaccine import GradVac
from .algorithms.gram_surgery import GramSurgery
from .algorithms.group_dro import GroupDRO
from .algorithms.iga import IGA
from .algorithms.inner_loops.fish import Fish
from .algorithms.inner_loops.pgrad import PGrad
from .algorithms.inner_loops.pogm import POGM
from .algorithms.irm import IRM
from .algorithms.miro import MIRO
from .algorithms.pcgrad import PCGrad
from .algorithms.rise import RISE
from .algorithms.risks.eqrm import EQRM
from .algorithms.risks.rdm import RDM
from .algorithms.risks.sd import SD
from .algorithms.sand_mask import SANDMask
from .algorithms.sma import SMA
from .algorithms.swad import SWAD
from .algorithms.vrex import VREx
from .core.compiled import compiled
from .core.optimizer import DomainOptimizer
from .domain_ids import DomainIds
from .factors import Dense, Lookup, Outer
from .gradients.rules.registry import register_rule
from .gradients.tape import Tape
from .mixing import mix_students, mix_teachers
from .models.unet import UNetMasker
from .ops import backends, use_backend
from .selfsup.adios import ADIOS
from .selfsup.objectives import BYOL, Objective, SimCLR, SimSiam
from .statistics.api import (
    domain_gradients,
    domain_gram,
    domain_moments,
    explain,
    per_sample_gradients,
    per_sample_norms,
)
from .statistics.check import check
from .statistics.moments import DomainMoments
from .statistics.record import record
from .statistics.samples import (
    GradientNoise,
    clipped_gradient,
    gradient_noise,
    per_sample_gram,
    per_sample_products,
)
from .text import TextTables, text_tables
from .tracking import log

__version__ = "0.1.0"

__all__ = [
    "ADIOS",
    "BYOL",
    "CORAL",
    "DISAM",
    "EQRM",
    "ERM",
    "GAM",
    "GENIE",
    "GGA",
    "GGAL",
    "GSAM",
    "IBERM",
    "IBIRM",
    "IGA",
    "IMTLG",
    "IRM",
    "MGDA",
    "MIRO",
    "MLDG",
    "MMD",
    "POGM",
    "RDM",
    "RISE",
    "SAGM",
    "SAM",
    "SD",
    "SMA",
    "SWAD",
    "ANDMask",
    "AgrRand",
    "AgrSum",
    "AlignedMTL",
    "CAGrad",
    "CausIRL",
    "ConFIG",
    "Dense",
    "DomainIds",
    "DomainMoments",
    "DomainOptimizer",
    "DualProj",
    "FairGrad",
    "Fish",
    "Fishr",
    "GradVac",
    "GradientNoise",
    "GramSurgery",
    "GroupDRO",
    "Lookup",
    "NashMTL",
    "Objective",
    "Outer",
    "PCGrad",
    "PGrad",
    "SANDMask",
    "SimCLR",
    "SimSiam",
    "Tape",
    "TextTables",
    "UNetMasker",
    "UPGrad",
    "VREx",
    "backends",
    "check",
    "clipped_gradient",
    "compiled",
    "domain_gradients",
    "domain_gram",
    "domain_moments",
    "explain",
    "func",
    "gradient_noise",
    "log",
    "mix_students",
    "mix_teachers",
    "ops",
    "per_sample_gradients",
    "per_sample_gram",
    "per_sample_norms",
    "per_sample_products",
    "record",
    "register_rule",
    "text_tables",
    "use_backend",
    "weightings",
]
