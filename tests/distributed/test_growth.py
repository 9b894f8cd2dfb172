"""However many parameters there are, a step has the same collectives, host reads and copies."""

from __future__ import annotations

import pytest
from growth import WRAPS, a_step
from pool import Pool


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_step_of_more_parameters_waits_no_more_often(pool: Pool, wrap: str) -> None:
    few, many = (pool.run(2, a_step, wrap, layers) for layers in (3, 12))
    for one, other in zip(few, many, strict=True):
        assert not isinstance(one, str), one
        collectives, reads = one
        assert sum(collectives.values()) > 1 and reads
        assert other == one
