"""Per-sample gradients of one parameter, in the form in which its operation makes them."""

from .base import Agreement, Dense, Factor, flat, total, weighted_sum
from .lookup import Lookup
from .outer import Outer

__all__ = [
    "Agreement",
    "Dense",
    "Factor",
    "Lookup",
    "Outer",
    "flat",
    "total",
    "weighted_sum",
]
