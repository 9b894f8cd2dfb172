"""What do RISE's losses cost beside loops over samples? To reach: 1.5 ms, and 20 times less."""

from typing import Any

import pytest
from rise_cases import WAYS, Batch, loops


@pytest.mark.parametrize("way", WAYS)
def test_losses(benchmark: Any, way: str) -> None:
    on = Batch.of()
    run = WAYS[way](on)
    if way != "cross-entropy alone":
        for got, exact in zip(run(), loops(on.double())(), strict=True):
            assert float((got - exact).norm() / exact.norm()) < 1e-5
    benchmark.group = "RISE's losses and their gradients, B=128, C=65, A=3, E=512"
    benchmark.pedantic(run, rounds=20 if way == "loop over samples" else 200, warmup_rounds=2)
