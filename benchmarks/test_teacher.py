"""What does MIRO cost? To reach: one frozen forward and a tenth of it beside the plain step, and a
regulariser twice as fast as the formula in autograd."""

from typing import Any

import pytest
from cases import DEEP_TOLERANCE
from teacher_cases import REGULARISERS, SAMPLES, STEPS, Maps, Training, eager

SHAPES = "ResNet-18, frozen BN, 3x64x64"


@pytest.mark.parametrize("way", REGULARISERS)
def test_regulariser(benchmark: Any, way: str, smoke: bool) -> None:
    samples = 8 if smoke else SAMPLES
    on, exact = Maps(samples), Maps(samples)
    run = REGULARISERS[way](on)
    for tensors in (exact.features, exact.biases):
        tensors[:] = [x.detach().double().requires_grad_() for x in tensors]
    exact.oracles = [x.double() for x in exact.oracles]
    for got, wanted in zip(run(), eager(exact)(), strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5
    benchmark.group = f"MIRO's regulariser and gradients, 5 maps, {SHAPES}, N={samples}"
    benchmark.pedantic(run, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("way", STEPS)
def test_step(benchmark: Any, way: str, smoke: bool) -> None:
    at = Training(8 if smoke else SAMPLES)
    run = STEPS[way](at)
    if way == "fastdg":
        other = Training(at.on.samples)
        STEPS["hooks and autograd"](other)()
        run()
        for p, q in zip(at.on.model.parameters(), other.on.model.parameters(), strict=True):
            assert float((p.grad - q.grad).norm() / q.grad.norm()) < DEEP_TOLERANCE
    benchmark.group = f"MIRO's step, {SHAPES}, N={at.on.samples}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
