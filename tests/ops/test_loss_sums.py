"""``loss_sums`` on every backend that is here, against a loop."""

from __future__ import annotations

import re

import pytest
import torch

from fastdg import ops
from fastdg.domains import partition


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("samples", [0, 1, 7, 300])
@pytest.mark.parametrize("strided", [False, True])
def test_it_sorts_and_sums(device: str, dtype: torch.dtype, samples: int, strided: bool) -> None:
    D, generator = 5, torch.Generator().manual_seed(samples)
    domains = torch.randint(D - 1, (samples * 2,), generator=generator)  # the last one is empty
    losses = torch.randn(samples * 2, generator=generator, dtype=torch.float64).to(dtype)
    domains, losses = (x.to(device) for x in (domains, losses))
    rows = slice(None, None, 2) if strided else slice(samples)
    domains, losses = domains[rows], losses[rows]
    order, offsets, count, sums = ops.loss_sums(losses, domains, D)
    ids = domains.tolist()
    of = [[n for n, d in enumerate(ids) if d == k] for k in range(D)]
    assert order.tolist() == [n for numbers in of for n in numbers]
    assert offsets.tolist() == [sum(map(len, of[:k])) for k in range(D + 1)]
    assert count.tolist() == [len(numbers) for numbers in of]
    assert order.dtype == offsets.dtype == count.dtype == torch.int64
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.stack([losses[numbers].double().sum() for numbers in of])
    torch.testing.assert_close(sums, expected.to(sums.dtype))


def test_one_nan_stays_in_its_domain(device: str) -> None:
    losses = torch.tensor([1.0, torch.nan, 2.0, torch.inf], device=device)
    sums = ops.loss_sums(losses, torch.tensor([0, 1, 0, 2], device=device), 4)[3]
    assert sums.isnan().tolist() == [False, True, False, False]
    assert sums[0] == 3 and sums[2] == torch.inf and sums[3] == 0


@pytest.mark.parametrize(
    ("domains", "D", "message"),
    [
        ([0, 1, 2], 2, "domains: expected ids from 0 to 1, got 2"),
        ([0, -1, 2], 3, "domains: expected ids from 0 to 2, got -1"),
        ([0, 1], 2, "domains: expected shape (3,)"),
        ([0, 1, 1], 0, "num_domains: expected 1 to 2**28, got 0"),
    ],
)
def test_wrong_ids_are_refused(domains: list[int], D: int, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        ops.loss_sums(torch.zeros(3), torch.tensor(domains), D)


def test_a_partition_has_the_same_numbers_with_and_without_the_op() -> None:
    """Integer losses take the other way."""
    ids = torch.tensor([3, 0, 0, 2, 3])
    for D in (None, 6):
        with_sums = partition(ids, torch.ones(5), D)
        without = partition(ids, torch.ones(5, dtype=torch.int64), D)
        assert with_sums.loss_sums is not None and without.loss_sums is None
        for name in ("order", "offsets", "domains", "count"):
            assert torch.equal(getattr(with_sums, name), getattr(without, name))
