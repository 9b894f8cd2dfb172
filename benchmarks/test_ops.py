"""How near are the ops to the library's weight gradient of the same layer, and to a copy?"""

from typing import Any

import pytest
from ops_cases import LAYERS, OPS

PAIRS = [
    (layer, what)
    for layer in OPS
    for what in (
        ("weight gradient", "copy", "outer_moments", "outer_moments_backward", "outer_domain")
        if any(layer == known.name for known in LAYERS)
        else ("copy", layer.split(",")[0], layer.split(",")[0] + "_backward")
    )
]


@pytest.mark.parametrize("layer, what", PAIRS, ids=lambda text: text.replace(" ", "_"))
def test_ops(benchmark: Any, layer: str, what: str) -> None:
    case = OPS[layer]()
    benchmark.group = f"ops: {layer}, N=96"
    benchmark.extra_info["flops"] = case.flops.get(what)
    benchmark.extra_info["bytes"] = case.moved.get(what)
    if what in ("outer_moments", "moments", "text_distance", "variance_gap"):
        assert case.check() < 1e-5
    benchmark.pedantic(case.runs[what], rounds=15, warmup_rounds=2)
