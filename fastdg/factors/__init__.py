"""Per-sample gradients of one parameter, in the cheapest form for its operation."""

from .base import Agreement, Dense, PerSampleGrad, flat, weighted_sum
from .lookup import Lookup
from .norm import NormCall, OfNorm
from .outer import Outer

__all__ = [
    "Agreement",
    "Dense",
    "Lookup",
    "NormCall",
    "OfNorm",
    "Outer",
    "PerSampleGrad",
    "flat",
    "weighted_sum",
]
