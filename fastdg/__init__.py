"""fastdg: gradient statistics and algorithms for domain generalisation, at nearly the price of
plain training."""

from . import func, ops
from .ops import backends, use_backend
from .optim.fishr import Fishr
from .optim.wrapper import DomainOptimizer
from .statistics.api import (
    Tape,
    check,
    domain_gradients,
    domain_gram,
    domain_moments,
    per_sample_gradients,
    per_sample_norms,
    record,
)
from .statistics.factors import Dense, Lookup, Outer
from .statistics.layers import register_rule
from .statistics.moments import DomainMoments

__version__ = "0.1.0"

__all__ = [
    "Dense",
    "DomainMoments",
    "DomainOptimizer",
    "Fishr",
    "Lookup",
    "Outer",
    "Tape",
    "backends",
    "check",
    "domain_gradients",
    "domain_gram",
    "domain_moments",
    "func",
    "ops",
    "per_sample_gradients",
    "per_sample_norms",
    "record",
    "register_rule",
    "use_backend",
]
