"""Ranks that have other settings of one training say so, and none of them waits."""

from __future__ import annotations

import pytest
from divergent import diverge, one_domain_each, schedule
from pool import Pool

SAID = {
    "weight": "VREx.penalty_weight: expected the same on every rank, got 1.0 on rank 0 and 2.0 on",
    "domains": "PCGrad.num_domains: expected the same on every rank, got 3 on rank 0 and 4 on",
    "many domains": "VREx.num_domains: expected the same on every rank, got 3 on rank 0 and 99 on",
    "algorithm": "opt: expected the same on every rank, got PCGrad(SGD) on rank 0 and AgrSum(SGD)",
    "params": "Fishr.params: expected the same on every rank, got ['body.weight'] on rank 0 and "
    "['body.weight', 'head.bias'] on",
    "term": "MIRO.weight: expected the same on every rank, got 0.1 on rank 0 and 0.2 on",
    "around a term": "Fishr.anneal_steps: expected the same on every rank, got 9 on rank 0 and 7",
    "no term": "opt: expected the same on every rank, got VREx(SGD) on rank 0 and VREx(MIRO(SGD))",
    "weighting": "GramSurgery.weighting: expected the same on every rank, got first on rank 0 and "
    "last on",
    "base": "opt: expected the same on every rank, got VREx(SGD) on rank 0 and VREx(Adam) on",
}


@pytest.mark.parametrize("case", SAID)
def test_settings_differ(pool: Pool, case: str) -> None:
    for text, untouched in pool.run(2, diverge, case):
        assert SAID[case] in text
        assert text.startswith("RuntimeError: ")
        assert "rank 1. Create the wrapper with the same settings on all ranks" in text
        assert untouched


def test_of_three_ranks_the_one_that_differs_is_named(pool: Pool) -> None:
    for text, _ in pool.run(3, diverge, "weight"):
        assert "got 1.0 on rank 0 and 2.0 on rank 2. " in text


def test_settings_that_move(pool: Pool) -> None:
    """Together on all ranks, which is right; then on one alone."""
    assert pool.run(2, schedule, True) == [("", 3)] * 2
    for text, steps in pool.run(2, schedule, False):
        assert "VREx.penalty_weight: expected the same on every rank, got 1.0 on rank 0" in text
        assert "and 2.0 on rank 1" in text
        assert steps == 2


def test_a_domain_on_each_rank_is_no_habit(pool: Pool) -> None:
    """What counts is the step of all ranks; one of them tells."""
    first, second = pool.run(2, one_domain_each)
    assert second == []
    (text,) = first
    assert "VREx compares the domains of a step, but each of the last 20 steps saw one" in text
