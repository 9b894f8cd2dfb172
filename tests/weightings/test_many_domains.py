"""Weightings of many domains, and of gradients of very different lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdg import weightings


@pytest.mark.parametrize("domains", [14, 40])
@pytest.mark.parametrize("rank", [60, 12])
def test_projections_of_many_domains_meet_their_conditions(domains: int, rank: int) -> None:
    r"""v minimises :math:`v^\top K v` over :math:`v \ge l` where :math:`K v \ge 0`, and 0 where
    :math:`v > l`."""
    generator = torch.Generator().manual_seed(domains)
    rows = torch.randn(domains, rank, generator=generator, dtype=torch.float64)
    gram = rows @ rows.t()
    least = torch.full((domains,), 1 / domains, dtype=torch.float64)
    found = weightings.DualProj()(gram)
    assert bool((found >= least - 1e-10).all())
    slope = gram @ found / gram.diagonal().max()
    assert slope.min() > -1e-8
    assert (slope * (found - least)).abs().max() < 1e-8
    mean = weightings.UPGrad()(gram)
    assert (gram @ mean).min() > -1e-8 * gram.diagonal().max()


def test_many_domains_solve_few_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    solved, solve = [], torch.linalg.solve_ex

    def counted(matrix: Tensor, right: Tensor) -> Any:
        solved.append(matrix.shape[:-2].numel())
        return solve(matrix, right)

    monkeypatch.setattr(torch.linalg, "solve_ex", counted)
    rows = torch.randn(48, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weightings.UPGrad()(rows @ rows.t())
    assert sum(solved) <= 48 * 60  # and not 48 for each of the 48 projections


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_short_gradients_count_in_aligned_mtl(ratio: float) -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = (rows * torch.tensor([[1.0], [ratio], [1.0]])).float()
    weights = weightings.AlignedMTL()(rows @ rows.t())
    exact = weightings.AlignedMTL()(rows.double() @ rows.double().t())
    torch.testing.assert_close(weights.double(), exact, rtol=1e-3, atol=0)
    values = torch.linalg.svdvals(rows.double())
    combined = weights.double() @ rows.double()
    assert combined.norm() == pytest.approx(float(values[-1]) / 3**0.5, rel=1e-3)


@pytest.mark.parametrize("domains", [16, 60])
@pytest.mark.parametrize("seed", range(4))
def test_mgda_of_many_domains_of_unequal_lengths(domains: int, seed: int) -> None:
    r"""The shortest combination: :math:`\langle g_d, g_w\rangle \ge |g_w|^2` for all d."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 10 ** (6 * torch.rand(domains, 1, generator=generator, dtype=torch.float64) - 3)
    rows = torch.randn(domains, 2 * domains, generator=generator, dtype=torch.float64) * lengths
    gram = (rows.float() @ rows.float().t()).double()
    weights = weightings.MGDA()(gram)
    assert weights.min() >= 0 and float(weights.sum()) == pytest.approx(1)
    slope, square = gram @ weights, weights @ gram @ weights
    assert bool((slope >= square * (1 - 1e-6)).all())
