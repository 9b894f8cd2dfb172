"""Validation of the ops' arguments: once, before any backend, for real and for fake tensors alike.

Each op has a check of shapes, dtypes, devices and numbers, which waits for no device, and some have
a second one of the values of their indices. The second reads indices on the CPU. Indices on another
device are trusted, as reading them would wait for it; ``FASTDG_CHECK_INDICES=1`` has them read too.
Errors say ``argument: problem, got X. What to do.``
"""

from .lists import alike, gradients, one_each, shaped, weighted, written
from .outer import outer
from .partitions import domain_values, label_values, partition, partition_values
from .tensors import LARGEST_SIDE, dims, finite, floating, mask, on_device, shape, statistic, vector

__all__ = [
    "LARGEST_SIDE",
    "alike",
    "dims",
    "domain_values",
    "finite",
    "floating",
    "gradients",
    "label_values",
    "mask",
    "on_device",
    "one_each",
    "outer",
    "partition",
    "partition_values",
    "shape",
    "shaped",
    "statistic",
    "vector",
    "weighted",
    "written",
]
