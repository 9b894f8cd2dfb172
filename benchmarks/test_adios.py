"""What does a step of ADIOS cost beside its N + 1 encodes? To reach: 1.1 times as much."""

from typing import Any

import pytest
import torch
from adios_cases import IMAGES, MASKS, WAYS, Setup, by_pairs


@pytest.mark.parametrize("way", WAYS)
def test_step(benchmark: Any, way: str, smoke: bool) -> None:
    images = 6 if smoke else IMAGES
    on = Setup(images)
    run = WAYS[way](on)
    if way == "fastdg":
        other = Setup(images)
        by_pairs(other)()
        run()
        for p, q in zip(on.weights(), other.weights(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    benchmark.group = f"ADIOS, N={MASKS}: ResNet-18, frozen BN, 3x64x64, {IMAGES} images"
    benchmark.pedantic(run, rounds=1 if smoke else 3, warmup_rounds=0 if smoke else 1)
