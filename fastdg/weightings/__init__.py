"""Weightings: functions of the domains' Gram matrix that give each gradient its weight.

>>> weights = fastdg.weightings.MGDA()(fastdg.domain_gram(losses, domains, params=model))

Each is an algorithm of its own, too, ``fastdg.MGDA(optimizer)``, and a ``weighting`` of
`fastdg.GramSurgery`. `GramWeighting` documents the calls that all have.
"""

from .aligned_mtl import AlignedMTL
from .cagrad import CAGrad
from .config import ConFIG
from .fair_grad import FairGrad
from .grad_vac import GradVac
from .gram import GramWeighting
from .imtl_g import IMTLG
from .mgda import MGDA
from .nash_mtl import NashMTL
from .upgrad import DualProj, UPGrad

__all__ = [
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradVac",
    "GramWeighting",
    "NashMTL",
    "UPGrad",
]
