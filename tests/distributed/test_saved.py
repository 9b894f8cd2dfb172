"""Checkpoints of parameters that are sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parallel import Run
from pool import Pool
from saved import resumed


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("wrap", ["Fishr", "Fish", "AgrRand", "Fishr(MIRO(RISE))"])
def test_goes_on_bit_for_bit(pool: Pool, tmp_path: Path, wrap: str, distributed: bool) -> None:
    """With a history that is whole on every rank, kept weights that are sharded, a generator's
    state, and an oracle that is not sharded."""
    run = Run(wrap, engine="fsdp", base="adam")
    for answer in pool.run(2, resumed, run, tmp_path if distributed else None):
        assert not isinstance(answer, str), answer
        weights, again = answer
        for name, value in weights.items():
            assert torch.equal(value, again[name]), name
