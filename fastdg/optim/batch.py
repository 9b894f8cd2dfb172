"""What a wrapper stages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..domains import Partition
from ..statistics.api import Resolved


@dataclass
class Batch:
    """One staged micro-batch: its losses, its domains, and what the tape knows of its forward."""

    losses: Tensor
    partition: Partition
    resolved: Resolved
