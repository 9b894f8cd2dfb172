"""The compiled column ops against float64, on every instruction set this machine runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdg import native, ops

if not native.status()[0]:
    pytest.skip(f"no compiled ops: {native.status()[1]}", allow_module_level=True)

cpp = torch.ops.fastdg_cpp
INF = math.inf
# Around the ends of a vector, of a few, of a block and of a task; nothing; many small ones.
SIZES = [1, 0, *range(2, 40, 5), 63, 64, 65, 1023, 1024, 1025, 16384, 16385, 3, 3, 40001]


def lists(sizes: Sequence[int], D: int) -> list[list[Tensor]]:
    """Gradients at any multiple of four bytes."""
    grads = []
    for d in range(D):
        memory = torch.randn(sum(sizes) + 3 * len(sizes) + d)[d:]
        places = itertools.accumulate((size + 3 for size in sizes), initial=0)
        grads.append([memory[at : at + n] for at, n in zip(places, sizes, strict=False)])
    return grads


def flat(grads: list[list[Tensor]]) -> list[Tensor]:
    return [g for domain in grads for g in domain]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


def some_weights(D: int) -> Tensor:
    weights = torch.linspace(0.5, 1.5, D) * (1 - 2 * (torch.arange(D) % 2))
    weights[2::3] = 0
    return weights


def reference(name: str, *args: object) -> Any:
    return ops.dispatch.registry.OPS[name].reference(*args)


def assert_near(got: object, expected: object, limit: float = 2e-6) -> None:
    """Within the limit of the norm, tensor by tensor."""
    leaves = torch.utils._pytree.tree_leaves
    for one, two in zip(leaves(got), leaves(expected), strict=True):
        assert one.shape == two.shape and one.is_contiguous()
        assert float((one - two).norm()) <= limit * float(two.norm())


@pytest.mark.parametrize("D", [1, 3, 6, 7, 19])
def test_sizes_and_alignments(isa: str, D: int) -> None:
    grads, weights = flat(lists(SIZES, D)), some_weights(D)
    assert_near(cpp.gram(grads, D), reference("gram", double(grads), D))
    assert_near(cpp.combine(grads, weights), reference("combine", double(grads), weights.double()))
    for threshold, steepness in ((1.0, INF), (0.3, INF), (0.3, 5.0)):
        args = threshold, steepness
        # In fp32 too: the threshold is one.
        expected = reference("agreement", grads, weights, *args)
        assert_near(cpp.agreement(grads, weights, *args), expected, 1e-5)


@pytest.mark.parametrize("D", range(1, 65))
def test_every_number_of_domains(isa: str, D: int) -> None:
    grads, weights = flat(lists([5, 67], D)), some_weights(D)
    assert_near(cpp.gram(grads, D), reference("gram", double(grads), D))
    assert_near(cpp.combine(grads, weights), reference("combine", double(grads), weights.double()))
    for args in ((0.2, INF), (0.2, 3.0)):
        expected = reference("agreement", grads, weights, *args)
        assert_near(cpp.agreement(grads, weights, *args), expected, 1e-5)


def test_large_results_go_past_the_caches(isa: str) -> None:
    grads = flat(lists([1 << 22, 100_003, 5], 2))
    weights = torch.tensor([0.5, -2.0])
    assert_near(cpp.combine(grads, weights), reference("combine", grads, weights))
    expected = reference("agreement", grads, weights, 1.0, INF)
    assert_near(cpp.agreement(grads, weights, 1.0, INF), expected)
    variance = [torch.rand(2, 1_048_579), torch.rand(2, 1 << 20)]
    args = variance, [], torch.tensor([True, True]), 0.0
    up = torch.tensor(0.5)
    expected = reference("variance_gap_backward", up, *args)
    assert_near(cpp.variance_gap_backward(up, *args), expected)


@pytest.mark.parametrize("D", [1, 3, 20])
def test_results_do_not_depend_on_the_threads(isa: str, D: int) -> None:
    grads, weights = lists([*SIZES, 100_000], D), some_weights(D)
    variance = [torch.rand(D, n) for n in (7, 30_000, 20_001)]
    here = weights != 0

    def results() -> list[Tensor]:
        found = [cpp.gram(flat(grads), D), *cpp.combine(flat(grads), weights)]
        for steepness in (INF, 3.0):
            combined, *sums = cpp.agreement(flat(grads), weights, 0.3, steepness)
            found += [*combined, *sums]
        parameters, kept = ([g.clone() for g in grads[d]] for d in (0, -1))
        found += [cpp.meta_step(parameters, kept, 0.3), *parameters, *kept]
        found.append(cpp.variance_gap(variance, variance, here, 2.0))
        return found + cpp.variance_gap_backward(torch.ones(()), variance, variance, here, 2.0)

    threads = torch.get_num_threads()
    first, *others = ([torch.set_num_threads(k), results()][1] for k in (1, 2, 3))
    torch.set_num_threads(threads)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


SPECIAL = [math.nan, INF, -INF, 0.0, -0.0, 1e-40, 1.0, -1.0, 2.5]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_all_that_can_meet_in_a_column(isa: str, threshold: float) -> None:
    """In vectors and, for the last columns, one by one."""
    columns = torch.tensor(list(itertools.product(SPECIAL, repeat=3))).t().contiguous()
    grads, weights = list(columns), torch.tensor([1.0, -0.5, 2.0])
    for steepness in (INF, 4.0):
        for w in (weights, weights * torch.tensor([1, 0, 1])):
            got = cpp.agreement(grads, w, threshold, steepness)
            expected = reference("agreement", grads, w, threshold, steepness)
            torch.testing.assert_close(got[0], expected[0], equal_nan=True)
            torch.testing.assert_close(got[1], expected[1])
            for k in range(0, columns.shape[1], 7):  # each place by itself
                one = [g[k : k + 1] for g in grads]
                got = cpp.agreement(one, w, threshold, steepness)
                expected = reference("agreement", one, w, threshold, steepness)
                torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=0)
    for w in (weights, weights * 0):
        got = cpp.combine(grads, w)
        torch.testing.assert_close(got, reference("combine", grads, w), equal_nan=True)
    for rate in (0.0, 0.3, 0.7, 1.0):
        one, two = ([g.clone() for g in grads[:2]] for _ in "ab")
        lengths = (
            cpp.meta_step(one[:1], one[1:], rate),
            reference("meta_step", two[:1], two[1:], rate),
        )
        torch.testing.assert_close(*lengths, equal_nan=True)
        torch.testing.assert_close(one, two, equal_nan=True)
        assert torch.equal(one[0].signbit(), one[1].signbit())


@pytest.mark.parametrize("kept", [False, True])
def test_variances_whose_gap_is_too_large_a_number(isa: str, kept: bool) -> None:
    here = torch.tensor([True, True, False, True])
    for column in itertools.product((0.0, 2.0, 1e15, 1e30, INF, math.nan), repeat=4):
        for width in (1, 40):
            variance = [torch.tensor(column).unsqueeze(1).expand(4, width).contiguous()]
            ema = [v.flip(0) for v in variance] if kept else []
            exact = reference("variance_gap", double(variance), double(ema), here, 2.0)
            got = cpp.variance_gap(variance, ema, here, 2.0)
            torch.testing.assert_close(got, exact.float(), equal_nan=True)


def test_the_soft_mask_is_a_tangent_to_fp32(isa: str) -> None:
    for n in (4096, 5):
        apart = torch.logspace(-1.2, 3, n)  # the mask's argument is 1 / variance
        grads = [2 + apart, 2 - apart]
        weights = torch.full((2,), 0.25)
        (got,), _, _ = cpp.agreement(grads, weights, -1.0, 1.0)
        x, y = (g.double() for g in grads)
        common = (x.sign() + y.sign()).abs() / 2
        variance = (x - y).square() / 2
        assert_near(got, torch.tanh((common + 1) / variance) * (x + y) / 4)


def test_what_is_read_and_written_must_fit() -> None:
    x, y = torch.randn(5), torch.randn(6)
    for run, message in (
        (lambda: cpp.gram([x, y], 2), r"gradients: .*got \[6\]"),
        (lambda: cpp.gram([x, x, x], 2), "gradients: .*domains"),
        (lambda: cpp.gram([x.double()], 1), "gradients: .*float32"),
        (lambda: cpp.combine([x], torch.ones(1).double()), "weights: .*float32"),
        (lambda: cpp.meta_step([x], [y], 0.5), r"kept: .*got \[6\]"),
        (lambda: cpp.meta_step([x], [], 0.5), "kept: "),
        (
            lambda: cpp.variance_gap([y], [], torch.ones(4).bool(), 0.0),
            "variance: ",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            run()


def test_the_router_takes_the_compiled_ops() -> None:
    x = torch.randn(4)
    for name, args in {
        "gram": ([x, x], 2),
        "combine": ([x, x], torch.ones(2)),
        "agreement": ([x, x], torch.ones(2), 1.0, INF),
    }.items():
        op = ops.dispatch.registry.OPS[name]
        assert op.route(*args) is getattr(cpp, name).default
        assert op.route([x.double(), x.double()], *args[1:]) is op.reference
