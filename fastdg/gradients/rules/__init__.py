"""Rules for known operations, one file per family; importing this package registers them."""

from . import broadcast, convolution, linear, lookup, norm

__all__ = ["broadcast", "convolution", "linear", "lookup", "norm"]
