"""Fast ways for known operations, one file for each family; to import this registers them."""

from . import broadcast, convolution, linear, lookup, norm

__all__ = ["broadcast", "convolution", "linear", "lookup", "norm"]
