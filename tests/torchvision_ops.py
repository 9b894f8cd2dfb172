"""What torchvision misses beside a torch that its compiled part was not built for."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache  # what it returns has to live on
def fit_torchvision() -> Any:
    """Let `import torchvision` work beside a torch that its compiled part was not built for.

    Python looks up two of its ops at import; timm and transformers import it for their models,
    which use neither.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
            torch.ops.load_library(library)
            return None
    except OSError:
        pass
    ops = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return ops
