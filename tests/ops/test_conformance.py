"""Every op, on every backend that is here, against loops in float64 written out in full."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_cases import (
    CASES,
    COUNTS,
    LAYOUTS,
    ROWS,
    assert_close,
    case,
    deal,
    gradients,
    laid_out,
    naive_moments,
    rows_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdg
from fastdg import ops

# -- values --


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("columns", [1, 7, 64, 1031])
def test_moments(device: str, columns: int, counts: tuple[int, ...]) -> None:
    order, offsets = deal(counts, device)
    for dtype, layout in itertools.product((torch.float32, torch.float64), LAYOUTS[:3]):
        grads = torch.randn(sum(counts), columns) + 0.5
        mean, variance = ops.moments(laid_out(grads.to(device, dtype), layout), order, offsets)
        expected = naive_moments(grads.double(), counts, order)
        assert_close(mean, expected[0])
        assert_close(variance, expected[1], float(expected[0].square().norm() + expected[1].norm()))
        assert bool((variance >= 0).all())


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_outer(device: str, kind: str, shape: tuple[int, ...], counts: tuple[int, ...]) -> None:
    order, offsets = deal(counts, device)
    rows, deltas, window = case(kind, shape, sum(counts), torch.float32, device)
    grads = gradients(rows, deltas, window)
    mean, variance = naive_moments(grads, counts, order)
    squares = float(variance.norm() + mean.square().norm())
    for dtype, layout in itertools.product((torch.float32, torch.float64), LAYOUTS):
        a, delta = laid_out(rows.to(dtype), layout), laid_out(deltas.to(dtype), layout)
        got = ops.outer_moments(a, delta, order, offsets, window)
        assert_close(got[0], mean)
        assert_close(got[1], variance, squares)
        assert bool((got[1] >= 0).all())
        single = torch.tensor(counts) <= 1
        assert bool((got[1][single.to(device)] == 0).all())
        assert_close(ops.outer_domain(a, delta, order, offsets, window), mean)
        assert_close(ops.outer_norms(a, delta, window), grads.square().sum((1, 2)))
        flat = mean.flatten(1)
        gram = ops.outer_gram(a, delta, order, offsets, window)
        assert_close(gram, flat @ flat.t(), float(grads.square().sum()))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_many_small_tensors(device: str, counts: tuple[int, ...]) -> None:
    order, offsets = deal(counts, device)
    N = sum(counts)
    grads = [torch.randn(N, *shape) + 0.5 for shape in ((7,), (), (2, 3), (0,), (1031,))]
    pairs = [case("rows", shape, N, torch.float32)[:2] for shape in ROWS]
    rows = [[x[:, 0] for x in pair] for pair in pairs if pair[0].shape[1] == 1]  # without T
    pairs += [(rows[0][0], rows[0][1]), (rows[4][0], rows[4][1])]
    exact = [x.reshape(N, x.shape[1:].numel()).double() for x in grads]
    exact += [
        gradients(*(x if x.dim() == 3 else x.unsqueeze(1) for x in pair), ()) for pair in pairs
    ]
    expected = [naive_moments(g, counts, order) for g in exact]
    for dtype, layout in itertools.product((torch.float32, torch.float64), LAYOUTS):
        a = [laid_out(x.to(device, dtype), layout) for x, _ in pairs]
        delta = [laid_out(x.to(device, dtype), layout) for _, x in pairs]
        moved = [x.to(device, dtype) for x in grads]
        dense = [laid_out(x, layout) if x.dim() > 1 else x for x in moved]
        for variance in (True, False):
            found = ops.foreach_moments(dense, a, delta, order, offsets, variance)
            for mean, (m, _) in zip(found[0], expected, strict=True):
                assert_close(mean, m.view_as(mean))
            assert len(found[1]) == (len(expected) if variance else 0)
            for spread, (m, v) in zip(found[1], expected, strict=False):
                assert_close(spread, v.view_as(spread), float(m.square().norm() + v.norm()))
                assert bool((spread >= 0).all())
        shapes = [tuple(x.shape[1:]) for x in dense]
        assert [tuple(mean.shape[1:]) for mean in found[0][: len(dense)]] == shapes


def test_many_small_tensors_are_computed_as_each_alone(device: str) -> None:
    """Little work, which takes no thread, and much."""
    order, offsets = deal((40, 1, 0, 55), device)
    grads = torch.randn(96, 700, device=device)
    a, delta = torch.randn(96, 3, 130, device=device), torch.randn(96, 3, 70, device=device)
    alone = ops.moments(grads, order, offsets), ops.outer_moments(a, delta, order, offsets)
    for repeat in (1, 9):
        lists = [[x] * repeat for x in (grads, a, delta)]
        found = ops.foreach_moments(*lists, order, offsets)
        for one, (mean, variance) in enumerate(alone):
            for k in range(one * repeat, (one + 1) * repeat):
                torch.testing.assert_close(found[0][k], mean)
                torch.testing.assert_close(found[1][k], variance)


def test_weighted_rows(device: str) -> None:
    weights = torch.tensor([0.5, 0.0, -2.0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = [torch.randn(3, *shape).to(dtype) for shape in ((4,), (), (2, 3), (0,), (5000,))]
        rows.append(torch.randn(6, 3).t().to(dtype))
        found = ops.combine_rows([x.to(device) for x in rows], weights.to(device))
        for x, got in zip(rows, found, strict=True):
            want = sum(w * row.double() for w, row in zip(weights.tolist(), x, strict=True))
            assert got.dtype == dtype
            assert got.shape == x.shape[1:]
            tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=tolerance)


def test_lists_that_do_not_fit_are_refused(device: str) -> None:
    order, offsets = deal((4, 2), device)
    x, other = torch.randn(6, 3, device=device), torch.randn(5, 3, device=device)
    thick = torch.randn(6, 1, 3, device=device)
    for args, text in (
        (([], [], []), "^grads: "),
        (([x], [x], []), "^delta: "),
        (([x, other], [], []), r"^grads\[1\]: "),
        (([x, x.double()], [], []), r"^grads\[1\]: "),
        (([], [x, other], [x, other]), r"^a\[1\]: "),
        (([], [x], [thick]), r"^delta\[0\]: "),
        (([other], [], []), "^order: "),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            ops.foreach_moments(*args, order, offsets)
    with pytest.raises((TypeError, ValueError), match=r"^order: "):
        ops.foreach_moments([x], [], [], torch.zeros_like(order), offsets)
    ones = torch.ones(6, device=device)
    for rows, weights, text in (
        ([], ones, "^rows: "),
        ([x], ones[:5], r"^rows\[0\]: "),
        ([x[:0]], ones[:0], "^weights: "),
        ([x, x.long()], ones, r"^rows\[1\]: "),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            ops.combine_rows(rows, weights)


def naive_gap(
    variance: Sequence[Tensor], ema: Sequence[Tensor], present: Tensor, h: float
) -> Tensor:
    total = sum((0 * v.double().sum() for v in variance), torch.zeros((), dtype=torch.float64))
    for k, v in enumerate(variance):
        u = (v if not ema else v + h * ema[k]).double()[present]
        for row in u:
            total = total + (row - u.mean(0)).square().sum()
    return total


GAPS = [[(3, 4)], [(3,), (3, 2, 5), (3, 70)], [(1, 6)], [(5, 0), (5, 3)], [(2, 1)] * 40]


@pytest.mark.parametrize("present", ["all", "some", "none"])
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("shapes", GAPS, ids=[f"{len(g)} of {g[0]}" for g in GAPS])
def test_variance_gap(device: str, shapes: list, history: bool, present: str) -> None:  # type: ignore[type-arg]
    D = shapes[0][0]
    here = {"all": torch.ones(D), "some": torch.arange(D) % 2, "none": torch.zeros(D)}[
        present
    ].bool()
    for dtype in (torch.float32, torch.float64):
        variance = [torch.rand(shape, dtype=dtype, device=device) for shape in shapes]
        ema = [torch.rand_like(v) for v in variance] if history else []
        inputs = [v.requires_grad_() for v in variance]
        got = ops.variance_gap(inputs, ema, here.to(device), 3.0)
        exact = [v.detach().double().cpu().requires_grad_() for v in variance]
        expected = naive_gap(exact, [m.cpu() for m in ema], here, 3.0)
        assert_close(got, expected.detach())
        grads = torch.autograd.grad(2 * got, inputs)
        wanted = torch.autograd.grad(2 * expected, exact)
        for one, two in zip(grads, wanted, strict=True):
            assert_close(one, two)


# -- what is not a number --


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_through(device: str, value: float) -> None:
    counts = (3, 1, 0, 2)
    order, offsets = deal(counts, device)
    grads = torch.randn(6, 37, device=device)
    for position, domain in ((1, 0), (3, 1)):
        bad = grads.clone()
        bad[order[position], 30] = value
        mean, variance = ops.moments(bad, order, offsets)
        hit = torch.zeros(4, 37, dtype=torch.bool, device=device)
        hit[domain, 30] = True
        for out in (mean, variance):
            assert torch.equal(~out.isfinite(), hit)

    for T in (1, 3):
        a, delta = torch.randn(6, T, 19, device=device), torch.randn(6, T, 11, device=device)
        for position, domain in ((1, 0), (3, 1)):
            bad = delta.clone()
            bad[order[position], T - 1, 4] = value
            hit = torch.zeros(4, 11, 19, dtype=torch.bool, device=device)
            hit[domain, 4] = True
            mean, variance = ops.outer_moments(a, bad, order, offsets)
            for out in (mean, variance, ops.outer_domain(a, bad, order, offsets)):
                assert torch.equal(~out.isfinite(), hit)
            sample = torch.zeros(6, dtype=torch.bool, device=device)
            sample[order[position]] = True
            assert torch.equal(~ops.outer_norms(a, bad).isfinite(), sample)
            hit = torch.zeros(4, 4, dtype=torch.bool, device=device)
            hit[domain], hit[:, domain] = True, True
            hit[2], hit[:, 2] = False, False  # the empty domain
            assert torch.equal(~ops.outer_gram(a, bad, order, offsets).isfinite(), hit)

    variance = torch.rand(3, 5, device=device)
    variance[1, 2] = value
    present = torch.tensor([True, True, True], device=device)
    assert not ops.variance_gap([variance], [], present, 0.0).isfinite()
    present[1] = False  # a domain that takes no part
    variance.requires_grad_()
    gap = ops.variance_gap([variance], [variance.detach()], present, 2.0)
    (got,) = torch.autograd.grad(gap, variance)
    assert gap.isfinite() and got.isfinite().all() and not got[1].any()


# -- derivatives --


SMALL = [
    ("rows", (1, 3, 2)),
    ("rows", (3, 2, 2)),
    ("window", (2, 2, (5,), (2, 2, 2))),
    ("window", (1, 2, (3, 4), (2, 2, 1, 2, 1, 1))),
]


def test_derivatives_in_double() -> None:
    counts = (3, 1, 0, 2)
    order, offsets = deal(counts)
    with fastdg.use_backend("reference"):
        grads = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda g: ops.moments(g, order, offsets), grads)
        for kind, shape in SMALL:
            a, delta, window = case(kind, shape, 6, torch.float64)
            inputs = (a.requires_grad_(), delta.requires_grad_())
            assert torch.autograd.gradcheck(
                lambda a, d, w=window: ops.outer_moments(a, d, order, offsets, w), inputs
            )
        here = torch.tensor([True, True, False, True])
        variance = [torch.rand(4, n, dtype=torch.float64, requires_grad=True) for n in (1, 3)]
        ema = [torch.rand_like(v) for v in variance]
        assert torch.autograd.gradcheck(
            lambda *v: ops.variance_gap(v, ema, here, 2.0), tuple(variance)
        )


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_derivatives(device: str, kind: str, shape: tuple[int, ...]) -> None:
    """Of every backend against autograd through the loops."""
    counts = (3, 1, 0, 2)
    order, offsets = deal(counts, device)
    for layout in LAYOUTS:
        a, delta, window = case(kind, shape, 6, torch.float32, device)
        a, delta = laid_out(a, layout), laid_out(delta, layout)
        inputs = (a.requires_grad_(), delta.requires_grad_())
        mean, variance = ops.outer_moments(*inputs, order, offsets, window)
        exact = tuple(x.detach().double().cpu().requires_grad_() for x in inputs)
        grads = torch.einsum("nto,nti->noi", exact[1], rows_of(exact[0], window))
        expected = naive_moments(grads, counts, order)
        c, e = torch.rand_like(mean), torch.rand_like(mean)
        of_mean, of_variance = (c * mean).sum(), (e * variance).sum()
        exact_mean = (c.double().cpu() * expected[0]).sum()
        exact_variance = (e.double().cpu() * expected[1]).sum()
        # One of the two alone comes to the op's backward as a zero expanded over all elements.
        for loss, exact_loss in (
            (of_mean + of_variance, exact_mean + exact_variance),
            (of_mean, exact_mean),
            (of_variance, exact_variance),
        ):
            got = torch.autograd.grad(loss, inputs, retain_graph=True)
            wanted = torch.autograd.grad(exact_loss, exact, retain_graph=True)
            for one, two in zip(got, wanted, strict=True):
                assert_close(one, two)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_derivatives_of_moments(device: str, counts: tuple[int, ...]) -> None:
    order, offsets = deal(counts, device)
    grads = torch.randn(sum(counts), 37, device=device, requires_grad=True)
    mean, variance = ops.moments(grads, order, offsets)
    c, e = torch.rand_like(mean), torch.rand_like(mean)
    (got,) = torch.autograd.grad((c * mean).sum() + (e * variance).sum(), grads)
    exact = grads.detach().double().cpu().requires_grad_()
    mean, variance = naive_moments(exact, counts, order)
    loss = (c.double().cpu() * mean).sum() + (e.double().cpu() * variance).sum()
    assert_close(got, torch.autograd.grad(loss, exact)[0])


def test_one_of_two_gradients_is_enough(device: str) -> None:
    order, offsets = deal((4, 2), device)
    a, delta = torch.randn(6, 3, 4, device=device), torch.randn(6, 3, 5, device=device)
    both = (a.clone().requires_grad_(), delta.clone().requires_grad_())
    expected = torch.autograd.grad(ops.outer_moments(*both, order, offsets)[1].sum(), both)
    (got,) = torch.autograd.grad(ops.outer_moments(a, both[1], order, offsets)[1].sum(), both[1])
    torch.testing.assert_close(got, expected[1])
    (got,) = torch.autograd.grad(
        ops.outer_moments(both[0], delta, order, offsets)[1].sum(), both[0]
    )
    torch.testing.assert_close(got, expected[0])


def test_what_has_no_derivative_says_so(device: str) -> None:
    order, offsets = deal((4, 2), device)
    a = torch.randn(6, 3, 4, device=device, requires_grad=True)
    delta = torch.randn(6, 3, 5, device=device)
    grads = a.flatten(1)
    present, weights = torch.ones(2, device=device).bool(), torch.ones(2, device=device)
    once: dict[str, Callable[[], Tensor]] = {
        "moments": lambda: ops.moments(grads, order, offsets)[1],
        "outer_moments": lambda: ops.outer_moments(a, delta, order, offsets)[1],
        "variance_gap": lambda: ops.variance_gap([grads[:2]], [], present, 0.0),
    }
    for name, run in once.items():
        (first,) = torch.autograd.grad(run().square().sum(), a, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name} is differentiable once"):
            first.sum().backward()
    never: dict[str, Callable[[], Tensor]] = {
        "outer_domain": lambda: ops.outer_domain(a, delta, order, offsets),
        "outer_gram": lambda: ops.outer_gram(a, delta, order, offsets),
        "outer_norms": lambda: ops.outer_norms(a, delta),
        "gram": lambda: ops.gram([[grads[:2]], [grads[2:4]]]),
        "combine": lambda: ops.combine([[grads[:2]], [grads[2:4]]], weights)[0],
        "combine_rows": lambda: ops.combine_rows([grads[:2]], weights)[0],
        "foreach_moments": lambda: ops.foreach_moments([grads], [], [], order, offsets)[0][0],
        "agreement": lambda: ops.agreement([[grads[:2]], [grads[2:4]]], weights)[0][0],
        "outer_agreement": lambda: ops.outer_agreement(a, delta, order, offsets, weights)[0],
    }
    for name, run in never.items():
        with pytest.raises(RuntimeError, match=f"fastdg::{name} has no derivative"):
            run().sum().backward()


@pytest.mark.parametrize("positions", [1, 3])
def test_moments_of_samples_that_agree(device: str, positions: int) -> None:
    """Their variance is a small difference of large squares: in float32, and its derivative."""
    generator = torch.Generator().manual_seed(0)

    def near(*shape: int) -> Tensor:
        base = 30 * torch.randn(1, *shape[1:], generator=generator, dtype=torch.float64)
        return (base + 0.01 * torch.randn(*shape, generator=generator, dtype=torch.float64)).float()

    order, offsets = deal((10, 0, 6), device)
    a, delta = near(16, positions, 20).to(device), near(16, positions, 7).to(device)
    weight = torch.rand(3, 7, 20, generator=generator).to(device)

    def run(dtype: torch.dtype) -> list[Tensor]:
        x, d = (t.to(dtype, copy=True).requires_grad_() for t in (a, delta))
        _, variance = ops.outer_moments(x, d, order, offsets)
        (variance * weight.to(dtype)).sum().backward()
        assert x.grad is not None and d.grad is not None
        return [variance.detach().double(), x.grad.double(), d.grad.double()]

    for got, expected in zip(run(torch.float32), run(torch.float64), strict=True):
        assert float((got - expected).norm() / expected.norm()) < 2e-3


class Asked(TorchDispatchMode):
    """Whether calls of the derivative asked for the gradient of ``a``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.fastdg.outer_moments_backward.default:
            self.found.append(args[-2])
        return func(*args, **(kwargs or {}))


def test_data_gets_no_gradient(device: str) -> None:
    order, offsets = deal((4, 3), device)
    a, delta = torch.randn(7, 12, 5, device=device), torch.randn(7, 12, 4, device=device)
    grads = []
    for data in (True, False):
        pair = a.clone().requires_grad_(not data), delta.clone().requires_grad_()
        mean, variance = ops.outer_moments(*pair, order, offsets)
        with Asked() as asked:
            (mean.square().sum() + variance.square().sum()).backward()
        assert asked.found == [not data]
        assert (pair[0].grad is None) is data
        grads.append(pair[1].grad)
    torch.testing.assert_close(*grads)
