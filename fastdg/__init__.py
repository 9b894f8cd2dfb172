"""fastdg: gradient statistics and algorithms for domain generalisation, at nearly the price of
plain training."""

from . import func, ops
from .domain_ids import DomainIds
from .gradients.rules import register_rule
from .gradients.tape import Tape
from .models.unet import UNetMasker
from .ops import backends, use_backend
from .optim.adios import ADIOS
from .optim.compiled import compiled
from .optim.contrast import BYOL, Objective, SimCLR, SimSiam
from .optim.erm import ERM
from .optim.fish import Fish
from .optim.fishr import Fishr
from .optim.gram_surgery import GramSurgery
from .optim.iga import IGA
from .optim.invariance import GroupDRO, VREx
from .optim.irm import IRM
from .optim.masking import ANDMask, SANDMask
from .optim.miro import MIRO
from .optim.rise import RISE, mix_students, mix_teachers
from .optim.surgery import AgrRand, AgrSum, PCGrad
from .optim.swad import SWAD
from .optim.wrapper import DomainOptimizer
from .statistics.api import (
    check,
    domain_gradients,
    domain_gram,
    domain_moments,
    explain,
    per_sample_gradients,
    per_sample_norms,
    record,
)
from .statistics.factors import Dense, Lookup, Outer
from .statistics.moments import DomainMoments
from .text import TextTables, text_tables
from .tracking import log

__version__ = "0.1.0"

__all__ = [
    "ADIOS",
    "BYOL",
    "ERM",
    "IGA",
    "IRM",
    "MIRO",
    "RISE",
    "SWAD",
    "ANDMask",
    "AgrRand",
    "AgrSum",
    "Dense",
    "DomainIds",
    "DomainMoments",
    "DomainOptimizer",
    "Fish",
    "Fishr",
    "GramSurgery",
    "GroupDRO",
    "Lookup",
    "Objective",
    "Outer",
    "PCGrad",
    "SANDMask",
    "SimCLR",
    "SimSiam",
    "Tape",
    "TextTables",
    "UNetMasker",
    "VREx",
    "backends",
    "check",
    "compiled",
    "domain_gradients",
    "domain_gram",
    "domain_moments",
    "explain",
    "func",
    "log",
    "mix_students",
    "mix_teachers",
    "ops",
    "per_sample_gradients",
    "per_sample_norms",
    "record",
    "register_rule",
    "text_tables",
    "use_backend",
]
