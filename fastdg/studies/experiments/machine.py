"""The machine that made a result."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ... import __version__


def machine() -> dict[str, Any]:
    """Return processor, threads and versions, for result files."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastdg": __version__,
    }


def processor() -> str:
    """Return the processor's name, as the system shows it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
