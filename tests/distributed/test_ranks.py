"""Training on several ranks is training in one process on all their batches together."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from parallel import (
    DOMAINS,
    RULES,
    WRAPS,
    Net,
    Result,
    Run,
    breaks_off,
    differ,
    no_loss,
    one_fails,
    train,
    validated,
)
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


@pytest.mark.product
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(("world", "split"), [(2, "mixed"), (3, "own")])
def test_equals_one_process(pool: Pool, wrap: str, world: int, split: str) -> None:
    check(pool, Run(wrap, "mixed" if wrap == "Fish" else split), world)


@pytest.mark.parametrize("wrap", RULES)
def test_rules_of_the_gram_matrix_equal_one_process(pool: Pool, wrap: str) -> None:
    """Whose weights may be large: in float64, so that rounding is not."""
    split = "mixed" if wrap in ("PGrad", "POGM") else "own"
    check(pool, Run(wrap, split, base="adam", dtype=torch.float64), 2)


@pytest.mark.parametrize("wrap", ["GGA", "GENIE", "AgrRand(global)"])
def test_dropout_draws_other_numbers_on_each_rank(pool: Pool, wrap: str) -> None:
    """From the stream that the algorithm draws from on rank 0."""
    first, other = pool.run(2, train, Run(wrap, dropout=0.5))
    assert not isinstance(first, str), first
    alike(other.weights, first.weights, 0)
    if wrap == "GGA":
        assert sum(seen["accepted"] for seen in first.statistics)


@pytest.mark.parametrize("wrap", WRAPS)
def test_fsdp_equals_one_process(pool: Pool, wrap: str) -> None:
    check(pool, Run(wrap, engine="fsdp", base="adam"), 3)


def test_fsdp_and_a_search(pool: Pool) -> None:
    check(pool, Run("GGA", engine="fsdp", base="adam", dtype=torch.float64), 2)


@pytest.mark.parametrize("wrap", ["GENIE", "PGrad", "POGM"])
def test_fsdp_is_refused(pool: Pool, wrap: str) -> None:
    for answer in pool.run(2, train, Run(wrap, engine="fsdp")):
        assert f"{wrap}.step: fully_shard has split the parameters" in str(answer)


@pytest.mark.parametrize("wrap", ["Fishr", "PCGrad", "SWAD(Fishr)"])
def test_fsdp_and_forwards_without_a_backward(pool: Pool, wrap: str) -> None:
    """After which the outermost module has all of its parameters, not this rank's part."""
    single = validated(wrap, None)
    for answer in pool.run(2, validated, wrap):
        assert not isinstance(answer, str), answer
        torch.testing.assert_close(answer, single, rtol=1e-5, atol=1e-5)


VARIANTS = {
    "no_wrapper_of_the_model": Run("Fishr", engine="bare", dtype=torch.float64),
    "no_wrapper_and_a_term": Run("VREx", engine="bare", base="adam"),
    "surgery_without": Run("PCGrad", engine="bare", dtype=torch.float64),
    "micro_batches": Run("Fishr(all)", micro=True, dtype=torch.float64),
    "micro_batches_of_irm": Run("IRM", micro=True, dtype=torch.float64),
    "micro_batches_of_surgery": Run("ANDMask", micro=True, dtype=torch.float64),
    "batch_norm": Run("AgrSum", "own", batch_norm=True, dtype=torch.float64),
    "batch_norm_and_gram": Run("PCGrad", "own", batch_norm=True, dtype=torch.float64),
    "micro_batches_and_fsdp": Run("AgrRand", engine="fsdp", micro=True, dtype=torch.float64),
    "batch_norm_and_fsdp": Run("PCGrad", "own", "fsdp", batch_norm=True, dtype=torch.float64),
    "a_domain_a_rank_and_fsdp": Run("Fishr(all)", "own", "fsdp", dtype=torch.float64),
    "unused_are_looked_for": Run("Fishr", options={"find_unused_parameters": True}),
    "gradients_are_views": Run("GroupDRO", base="adam", options={"gradient_as_bucket_view": True}),
    "views_and_surgery": Run("SANDMask", options={"gradient_as_bucket_view": True}),
    "micro_batches_of_features": Run("CORAL", micro=True, dtype=torch.float64),
    "micro_batches_of_cuts": Run("CausIRL", engine="bare", dtype=torch.float64),
    "micro_batches_of_losses": Run("RDM", micro=True, dtype=torch.float64),
    "ascent_with_batch_norm": Run("SAM", "own", batch_norm=True, dtype=torch.float64),
    "micro_batches_of_an_ascent_and_fsdp": Run("GAM", engine="fsdp", micro=True),
    "small_buckets": Run("IGA", dtype=torch.float64, options={"bucket_cap_mb": 1e-4}),
}


@pytest.mark.parametrize("run", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants(pool: Pool, run: Run) -> None:
    check(pool, run, 3)


SCALED = {
    "moments": Run("Fishr(all)"),
    "micro_batches": Run("IRM", micro=True),
    "exchange": Run("AgrRand", engine="bare"),
    "exchange_and_fsdp": Run("PCGrad", engine="fsdp"),
    "fish_and_fsdp": Run("Fish", engine="fsdp"),
    "terms": Run("Fishr(MIRO(RISE))"),
    "ascent_and_micro_batches": Run("SAM(Fishr)", micro=True),
    "ascent_and_fsdp": Run("GAM", engine="fsdp"),
    "average_and_fsdp": Run("SWAD(Fishr)", engine="fsdp", base="adam"),
}


@pytest.mark.parametrize("run", SCALED.values(), ids=SCALED.keys())
def test_a_scaler(pool: Pool, run: Run) -> None:
    """What overflows on one rank makes all skip the step."""
    check(pool, replace(run, scale=4096.0, overflow=2, dtype=torch.float64), 2)


def test_a_scaler_and_parameters_some_of_which_are_sharded(pool: Pool) -> None:
    for answer in pool.run(2, train, Run("MIRO", engine="fsdp", scale=4096.0)):
        assert "scaler: fully_shard has sharded only some of the parameters of" in answer


P = sum(p.numel() for p in Net().parameters())
K = sum(p.numel() for p in Net().head.parameters())
TENSORS = len(list(Net().parameters()))
D, W = DOMAINS, 3
OTHERS = -(-P // W) * (W - 1)  # of P in W pieces of one length, those of other ranks
LOSSES = 2 * (D + 1)
N, F = 8 * W, 3  # samples of a step on all ranks, features
# What rank 0 gives to each kind of collective in a step: the table in `fastdg.distributed.ranks`
NUMBERS = {
    ("VREx", "mixed"): {"all_reduce": LOSSES, "reducer": 2 * P},
    ("GroupDRO", "own"): {"all_reduce": LOSSES, "reducer": 2 * P},
    ("IRM", "mixed"): {"all_reduce": LOSSES + 8 * D, "reducer": 2 * P},
    ("MIRO", "mixed"): {"all_reduce": LOSSES + 4 + 2 * (9 + 1 + 1), "reducer": 2 * P},
    ("IGA", "mixed"): {"all_reduce": LOSSES + 2 * D * P, "reducer": 2 * P},
    ("Fishr", "mixed"): {"all_reduce": LOSSES + 4 * D * K, "reducer": 2 * P},
    ("Fishr(all)", "own"): {"all_reduce": LOSSES + 4 * D * P},
    ("CORAL", "mixed"): {"all_reduce": LOSSES + 2 * N * (F + D), "reducer": 2 * P},
    ("CausIRL", "mixed"): {"all_reduce": LOSSES + 2 * N * (F + 1), "reducer": 2 * P},
    ("PGrad", "mixed"): {"all_reduce": 2 * (2 + 1), "reducer": 2 * P},  # it has two domains
    ("POGM", "mixed"): {"all_reduce": LOSSES, "reducer": 2 * P},
    ("GENIE", "mixed"): {"all_reduce": LOSSES, "reducer": 2 * P},
    ("GENIE(batch)", "mixed"): {"all_reduce": LOSSES + 4 * D * P},
    ("AgrSum", "mixed"): {"all_reduce": 2 * D + 6 * TENSORS + 2 * W, "to_one": (D + 1) * OTHERS},
    ("ANDMask", "own"): {"all_reduce": 2 * D + 6 * TENSORS + 2 * W, "to_one": 2 * OTHERS},
    ("PCGrad", "mixed"): {
        "all_reduce": 2 * (D + D * D + TENSORS + W),
        "to_one": (D + 1) * OTHERS,
    },
}
# Algorithms whose steps have several backwards: how many, and what each sends
BACKWARDS = {
    "MLDG": (4, {"all_reduce": LOSSES, "reducer": 2 * P}),
    "GGA": (5, NUMBERS["PCGrad", "mixed"]),
}


@pytest.mark.parametrize(("wrap", "split"), NUMBERS)
def test_what_is_sent(pool: Pool, wrap: str, split: str) -> None:
    sent = pool.run(W, train, Run(wrap, split, counted=True, steps=3))[0].sent
    assert sent[1] == {"counts": 2 * 71 * W, **NUMBERS[wrap, split]}


@pytest.mark.parametrize("wrap", BACKWARDS)
def test_each_backward_of_a_step_sends_alike(pool: Pool, wrap: str) -> None:
    sent = pool.run(W, train, Run(wrap, counted=True, steps=3))[0].sent
    times, numbers = BACKWARDS[wrap]
    each = {"counts": 2 * 71 * W, **numbers}
    assert sent[1] == {kind: times * number for kind, number in each.items()}


def test_a_rank_fails(pool: Pool) -> None:
    """The others say so at once, and the next step goes on."""
    for world in (2, 3):
        answers = pool.run(world, one_fails)
        assert answers[-1].startswith("ValueError: losses: expected shape (N,), got ()")
        for answer in answers[:-1]:
            assert answer == (
                f"RuntimeError: VREx.backward: it failed on rank {world - 1}, and the other ranks "
                "did nothing. See the error of that rank."
            )


@pytest.mark.parametrize("wrap", ["AgrSum", "PCGrad"])
def test_a_backward_breaks_off(pool: Pool, wrap: str) -> None:
    """All ranks know, none waits, and the next step is the one it would have been."""
    for world in (2, 3):
        expected = pool.run(world, breaks_off, wrap, "none")[0][1]
        for who in ("last", "all"):
            for rank, (text, weights) in enumerate(pool.run(world, breaks_off, wrap, who)):
                told = rf"RuntimeError: {wrap}.backward: it failed on rank [\d, ]+"
                own = text == "ValueError: a hook does not like this gradient"
                # Of all that break off, a rank may hear of another before its own does
                assert own if rank == world - 1 and who == "last" else own or re.match(told, text)
                for p, q in zip(weights, expected, strict=True):
                    assert torch.equal(p, q)


def test_what_differs_is_said(pool: Pool) -> None:
    for case, what in {
        "weights": "the ranks have different weights",
        "steps": "the ranks are at different steps or run different algorithms",
        "used": "the forwards of the ranks used different parameters",
        "domains": "domains: Fish steps on one domain after the other",
        "static": "DistributedDataParallel(static_graph=True) is not supported",
    }.items():
        for answer in pool.run(2, differ, case):
            assert what in answer, (case, answer)


def test_a_validation_loss_that_is_none(pool: Pool) -> None:
    for answer in pool.run(2, no_loss):
        assert answer.startswith("ValueError: validation_loss: ")
