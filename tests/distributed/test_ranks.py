"""Training on several ranks is training in one process on all their batches together."""

from __future__ import annotations

import pytest
import torch
from parallel import WRAPS, Result, Run, train
from pool import Pool
from torch import Tensor


def alike(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=tolerance, atol=tolerance, equal_nan=True)


def check(pool: Pool, run: Run, world: int) -> list[Result]:
    """The ranks end with the same bits, which are what one process gets."""
    results = pool.run(world, train, run)
    for result in results:
        assert not isinstance(result, str), result
    first, *others = results
    for other in others:
        alike(other.weights, first.weights, 0)
    single = train(run, None, world)
    tolerance = 1e-6 if run.dtype == torch.float32 else 1e-12
    alike(first.weights, single.weights, tolerance)
    if single.averaged is not None:
        alike(first.averaged, single.averaged, tolerance)
    for result in results:
        for seen, expected in zip(result.statistics, single.statistics, strict=True):
            alike(seen, expected, 1e-5 if run.dtype == torch.float32 else 1e-10)
    return results


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(("world", "split"), [(2, "mixed"), (3, "own")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_one_process(
    pool: Pool, wrap: str, world: int, split: str, dtype: torch.dtype
) -> None:
    if wrap == "Fish" and split == "own":
        pytest.skip("its steps are on one domain each")
    check(pool, Run(wrap, split, dtype=dtype), world)
