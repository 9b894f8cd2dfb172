"""The ops on given gradients, on every backend that is here, against loops in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from op_cases import CASES, COUNTS, assert_close, case, deal, gradients, naive_moments
from torch import Tensor

from fastdg import ops

INF = math.inf
Lists = list[list[Tensor]]


# -- the truth --


def naive_gram(grads: Lists) -> Tensor:
    flat = [torch.cat([g.double().cpu().flatten() for g in domain]) for domain in grads]
    return torch.stack([torch.stack([(x * y).sum() for y in flat]) for x in flat])


def naive_combine(grads: Lists, weights: Tensor) -> list[Tensor]:
    return [
        sum((w * g.double().cpu() for g, w in zip(column, weights.tolist(), strict=True)))  # type: ignore[misc]
        for column in zip(*grads, strict=True)
    ]


def naive_mask(values: list[float], threshold: float, steepness: float) -> float:
    """The mask at one place from the values of the domains present, in Python's floats."""
    if any(math.isnan(v) for v in values):
        return 0.0 if math.isinf(steepness) else 1e-17
    common = abs(sum((v > 0) - (v < 0) for v in values)) / len(values)
    if math.isinf(steepness):
        return float(common >= threshold)
    mean = sum(values) / len(values)
    if len(values) > 1:
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    else:
        variance = 1e-17
    if math.isnan(variance):
        variance = 1e-17
    if variance == 0:
        return 1e-17 if common == threshold else float(common > threshold)
    return max(0.0, math.tanh(steepness / variance * (common - threshold)))


def naive_agreement(
    grads: Lists, weights: Tensor, threshold: float, steepness: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    here = [d for d, w in enumerate(weights.tolist()) if w != 0]
    combined, agreeing = [], []
    for column in zip(*grads, strict=True):
        if not here:
            combined.append(torch.zeros(column[0].shape, dtype=torch.float64))
            agreeing.append(0.0)
            continue
        rows = [column[d].double().cpu().flatten() for d in here]
        places = zip(*(row.tolist() for row in rows), strict=True)
        m = torch.tensor(
            [naive_mask(list(place), threshold, steepness) for place in places],
            dtype=torch.float64,
        )
        total = sum(float(weights[d]) * row for d, row in zip(here, rows, strict=True))
        combined.append((m * total).view(column[0].shape))
        agreeing.append(float(m.sum()))
    magnitude = torch.stack([g.abs().sum() for g in combined])
    return combined, torch.tensor(agreeing, dtype=torch.float64), magnitude


def assert_columns_close(
    got: tuple[list[Tensor], Tensor, Tensor], expected: tuple[list[Tensor], Tensor, Tensor]
) -> None:
    for one, two in zip(got[0], expected[0], strict=True):
        assert one.is_contiguous()
        assert_close(one, two)
    assert_close(got[1], expected[1])
    assert_close(got[2], expected[2])


# -- what the ops are tried on --

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one number": [()],
    "a few": [(3, 5), (1,), (33,), (0,), (2, 3, 4)],
    "a vector and a bit": [(8,), (7,), (9,), (16,), (31,), (32,), (65,)],
    "more than a block": [(5003,), (2,)],
    "many": [(2,)] * 40 + [(3, 3)] * 300,
}
LAYOUTS = ["plain", "rows of a stack", "strided", "transposed"]


def lists(
    shapes: Sequence[tuple[int, ...]],
    D: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
) -> Lists:
    """Gradients with something in common; a zero here and there."""
    stacks = [torch.randn(D, *shape) + torch.randn(shape) for shape in shapes]
    stacks = [stack.where(torch.rand(stack.shape) > 0.1, 0) for stack in stacks]
    stacks = [stack.to(device, dtype) for stack in stacks]
    if layout == "rows of a stack":
        return [[stack[d] for stack in stacks] for d in range(D)]

    def lay(x: Tensor) -> Tensor:
        if layout == "strided" and x.dim() > 0:
            wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
            wide[..., ::2] = x
            return wide[..., ::2]
        if layout == "transposed" and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return x.clone()

    return [[lay(stack[d]) for stack in stacks] for d in range(D)]


def some_weights(D: int, device: str = "cpu") -> Tensor:
    """Of either sign; every third domain is absent where there are three."""
    weights = torch.linspace(0.5, 1.5, D) * (1 - 2 * (torch.arange(D) % 2))
    weights[2::3] = 0
    return weights.to(device)


# -- values --


@pytest.mark.product("device", "shapes")
@pytest.mark.parametrize("D", [1, 2, 3, 4, 7, 16, 64])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_columns(device: str, shapes: list[tuple[int, ...]], D: int) -> None:
    if D > 16 and len(shapes) > 10:
        shapes = shapes[-30:]
    for dtype in (torch.float32, torch.float64):
        grads, weights = lists(shapes, D, device, dtype), some_weights(D, device)
        size = float(naive_gram(grads).diagonal().sum())
        got = ops.gram(grads)
        assert_close(got, naive_gram(grads), size)
        assert torch.equal(got, got.t())
        for one, two in zip(
            ops.combine(grads, weights), naive_combine(grads, weights), strict=True
        ):
            assert one.is_contiguous()
            assert_close(one, two, 10 * float(two.norm() + 1e-30))
        for threshold, steepness in ((1.0, INF), (0.4, INF), (0.3, 5.0), (0.0, 0.5)):
            args = (weights, threshold, steepness)
            assert_columns_close(ops.agreement(grads, *args), naive_agreement(grads, *args))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str) -> None:
    for shapes, D in itertools.product((SHAPES["a few"], [(37, 41), (300,)]), (1, 3, 17)):
        grads, weights = lists(shapes, D, device, layout=layout), some_weights(D, device)
        assert_close(ops.gram(grads), naive_gram(grads))
        assert_columns_close(
            ops.agreement(grads, weights), naive_agreement(grads, weights, 1.0, INF)
        )
        for one, two in zip(
            ops.combine(grads, weights), naive_combine(grads, weights), strict=True
        ):
            assert_close(one, two)


@pytest.mark.parametrize("present", [0, 1, 2])
@pytest.mark.parametrize("steepness", [INF, 10.0])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_few_domains_present(device: str, present: int, steepness: float, threshold: float) -> None:
    """None give zeros; one agrees with itself; what the absent ones hold is not looked at."""
    grads = lists([(5, 7), (40,)], 4, device)
    weights = torch.tensor([2.0 * (d < present) for d in range(4)])
    expected = naive_agreement(grads, weights, threshold, steepness)
    for d in range(present, 4):
        for g in grads[d]:
            g.fill_(float("nan"))
    got = ops.agreement(grads, weights.to(device), threshold, steepness)
    assert_columns_close(got, expected)
    if present == 0:
        assert not any(bool(x.any()) for x in (*got[0], *got[1:]))


def test_the_threshold_is_met_exactly(device: str) -> None:
    """3 of 5 is 0.6 in the gradients' dtype, as in DomainBed."""
    for D, positive in itertools.product((3, 5, 7, 10), range(11)):
        for dtype in (torch.float32, torch.float64):
            column = torch.tensor([1.0 if d < positive else -1.0 for d in range(D)], dtype=dtype)
            grads = [[g.view(1).to(device)] for g in column]
            common = abs(2 * min(positive, D) - D) / D
            got = ops.agreement(grads, torch.ones(D, device=device), common)
            assert float(got[1]) == 1
            got = ops.agreement(grads, torch.ones(D, device=device), common + 1e-6)
            assert float(got[1]) == 0


def test_agreement_of_equal_gradients(device: str) -> None:
    """No variance: the mask is 1 above the threshold, and 1e-17 on it."""
    grads = [[torch.full((37,), 0.1, device=device)] for _ in range(3)]
    weights = torch.ones(3, device=device)
    assert float(ops.agreement(grads, weights, 0.5, 10.0)[1]) == 37
    assert_close(
        ops.agreement(grads, weights, 1.0, 10.0)[1], torch.tensor([37e-17], dtype=torch.float64)
    )


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_meta_step(device: str, shapes: list[tuple[int, ...]], rate: float) -> None:
    for dtype, layout in itertools.product((torch.float32, torch.float64), LAYOUTS):
        before, after = lists(shapes, 2, device, dtype, layout)
        parameters = [torch.nn.Parameter(x) for x in after]
        ends = [(s.double().cpu(), p.detach().double().cpu().clone()) for s, p in
                zip(before, parameters, strict=True)]  # fmt: skip
        ends = [(start.clone(), end) for start, end in ends]
        memory = [(x.data_ptr(), x._version) for x in parameters]
        length = ops.meta_step(parameters, before, rate)
        assert length.shape == () and length.dtype == dtype and not length.requires_grad
        expected = sum(
            ((end - start).square().sum() for start, end in ends), torch.zeros(()).double()
        )
        assert_close(length, expected)
        for p, kept, (start, end), (address, version) in zip(
            parameters, before, ends, memory, strict=True
        ):
            assert_close(p, start + rate * (end - start), float(start.norm() + end.norm()))
            assert torch.equal(p, kept)
            assert p.data_ptr() == address and p._version > version
            if rate in (0, 1):
                assert torch.equal(p.detach().double().cpu(), end if rate else start)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_outer_agreement(
    device: str, kind: str, shape: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    order, offsets = deal(counts, device)
    weights = torch.tensor([(-1.5) ** d * (n > 0) for d, n in enumerate(counts)])
    for dtype, steepness in itertools.product((torch.float32, torch.float64), (INF, 0.7)):
        a, delta, window = case(kind, shape, sum(counts), dtype, device)
        mean, _ = naive_moments(gradients(a, delta, window), counts, order)
        args = (weights.to(device), 0.3, steepness)
        combined, agreeing, magnitude = ops.outer_agreement(a, delta, order, offsets, *args, window)
        expected = naive_agreement([[g] for g in mean], weights, *args[1:])
        assert_close(combined, expected[0][0], float(mean.norm()))
        assert agreeing.shape == magnitude.shape == ()
        assert_close(agreeing, expected[1][0], combined.numel())
        assert_close(magnitude, expected[2][0], float(mean.abs().sum()))


def test_relabelling_the_domains_changes_nothing(device: str) -> None:
    grads, weights = lists(SHAPES["a few"], 5, device), some_weights(5, device)
    order, offsets = deal((2, 3, 1, 0, 4), device)
    a, delta = torch.randn(10, 3, 7, device=device), torch.randn(10, 3, 6, device=device)
    new = torch.tensor([3, 0, 4, 1, 2], device=device)
    moved = [grads[d] for d in new.tolist()]
    torch.testing.assert_close(ops.gram(moved), ops.gram(grads)[new][:, new])
    groups = [order[offsets[d] : offsets[d + 1]] for d in new.tolist()]
    bounds = torch.tensor([0, *itertools.accumulate(map(len, groups))], device=device)
    for args in ((0.5, INF), (0.1, 3.0)):
        torch.testing.assert_close(
            ops.agreement(moved, weights[new], *args), ops.agreement(grads, weights, *args)
        )
        torch.testing.assert_close(
            ops.outer_agreement(a, delta, torch.cat(groups), bounds, weights[new], *args),
            ops.outer_agreement(a, delta, order, offsets, weights, *args),
        )
    torch.testing.assert_close(ops.combine(moved, weights[new]), ops.combine(grads, weights))


def test_gram_is_accurate_however_many_parameters(device: str) -> None:
    """All products positive, so that every rounding adds up; plain fp32 sums miss by 1e-4."""
    grads = [[torch.rand(1_500_000) + 0.5 for _ in range(2)] for _ in range(3)]
    exact = naive_gram(grads)
    got = ops.gram([[g.to(device) for g in domain] for domain in grads])
    assert float((got.double().cpu() / exact - 1).abs().max()) < 1e-6


# -- what is not a number --


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_what_is_not_finite_comes_through(device: str, value: float) -> None:
    for place in (3, 36):
        grads = [[torch.randn(37, device=device), torch.randn(5, device=device)] for _ in range(4)]
        grads[1][0][place] = value
        weights = torch.tensor([1.0, 1.0, 0.0, -1.0], device=device)
        hit = torch.zeros(37, dtype=torch.bool, device=device)
        hit[place] = True
        gram = ops.gram(grads)
        bad = torch.zeros(4, 4, dtype=torch.bool, device=device)
        bad[1], bad[:, 1] = True, True
        assert torch.equal(~gram.isfinite(), bad)
        for steepness in (INF, 4.0):
            combined, agreeing, magnitude = ops.agreement(grads, weights, 0.2, steepness)
            assert torch.equal(~combined[0].isfinite(), hit)
            assert combined[1].isfinite().all() and agreeing.isfinite().all()
            assert (~magnitude.isfinite()).tolist() == [True, False]
            absent = weights.clone()
            absent[1] = 0
            for out in ops.agreement(grads, absent, 0.2, steepness)[1:]:
                assert out.isfinite().all()
        for w in (weights, weights * torch.tensor([1, 0, 1, 1], device=device)):
            first, second = ops.combine(grads, w)
            assert torch.equal(~first.isfinite(), hit) and second.isfinite().all()

        kept = [g.clone() for g in grads[0]]
        length = ops.meta_step(grads[1], kept, 0.5)
        assert not length.isfinite()
        assert torch.equal(~grads[1][0].isfinite(), hit) and grads[1][1].isfinite().all()

    order, offsets = deal((3, 1, 2), device)
    weights = torch.tensor([1.0, 1.0, 0.0], device=device)
    for T, steepness in itertools.product((1, 3), (INF, 4.0)):
        a, delta = torch.randn(6, T, 19, device=device), torch.randn(6, T, 11, device=device)
        for position, seen in ((1, True), (3, True), (4, False)):
            bad = delta.clone()
            bad[order[position], T - 1, 4] = value
            combined, _, magnitude = ops.outer_agreement(
                a, bad, order, offsets, weights, 0.2, steepness
            )
            hit = torch.zeros(11, 19, dtype=torch.bool, device=device)
            hit[4] = seen
            assert torch.equal(~combined.isfinite(), hit)
            assert bool(magnitude.isfinite()) != seen


# -- halves, and what is refused --


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(device: str, dtype: torch.dtype) -> None:
    """Computed and summed in fp32; sums over parameters come in fp32, where they fit."""
    grads = [[(g * 40).to(dtype) for g in domain] for domain in lists([(50, 60), (3,)], 3, device)]
    weights = torch.ones(3, device=device)
    gram = ops.gram(grads)
    assert gram.dtype == torch.float32
    assert_close(gram, naive_gram(grads))
    combined, agreeing, magnitude = ops.agreement(grads, weights)
    expected = naive_agreement(grads, weights, 1.0, INF)
    assert agreeing.dtype == magnitude.dtype == torch.float32
    assert_close(agreeing, expected[1])
    assert_close(magnitude, expected[2])
    for one, two in zip(combined, expected[0], strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.cpu(), two.to(dtype))
    total = ops.combine(grads, weights)
    assert [g.dtype for g in total] == [dtype] * 2
    kept = [g.clone() for g in grads[0]]
    assert ops.meta_step(grads[1], kept, 0.5).dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(grads[1], kept, strict=True))


REFUSED: dict[str, tuple[Callable[[Lists], object], type[Exception], str]] = {
    "no domain": (lambda g: ops.gram([]), ValueError, "^gradients: .*domain"),
    "no tensor": (lambda g: ops.gram([[], []]), ValueError, "^gradients: .*tensor"),
    "another number": (
        lambda g: ops.gram([g[0], g[1][:1]]),
        ValueError,
        r"^gradients\[1\]: .*got 1",
    ),
    "another shape": (
        lambda g: ops.gram([g[0], [g[1][0], g[1][1].t()]]),
        ValueError,
        r"gradients\[1\]\[1\]: expected shape \(3, 4\) .*as gradients\[0\]\[1\]\), got \(4, 3\)",
    ),
    "another dtype": (
        lambda g: ops.combine([g[0], [g[1][0], g[1][1].double()]], torch.ones(2)),
        ValueError,
        r"^gradients\[1\]\[1\]: .*got torch.float64 on cpu",
    ),
    "integers": (
        lambda g: ops.agreement([[x.long() for x in d] for d in g], torch.ones(2)),
        TypeError,
        r"^gradients\[0\]\[0\]: .*got torch.int64",
    ),
    "sparse": (
        lambda g: ops.gram([[x.to_sparse() for x in d] for d in g]),
        TypeError,
        r"^gradients\[0\]\[0\]: ",
    ),
    "weights": (
        lambda g: ops.combine(g, torch.ones(3)),
        ValueError,
        r"^weights: .*got \(3,\)",
    ),
    "integer weights": (
        lambda g: ops.agreement(g, torch.tensor([1, 2])),
        TypeError,
        "^weights: .*got torch.int64",
    ),
    "weights elsewhere": (
        lambda g: ops.combine(g, torch.ones(2, device="meta")),
        ValueError,
        "^weights: .*got one on meta",
    ),
    "nothing kept": (
        lambda g: ops.meta_step([], [], 0.5),
        ValueError,
        "^parameters: .*got none",
    ),
    "less kept": (
        lambda g: ops.meta_step(g[0], g[1][:1], 0.5),
        ValueError,
        "^kept: .*got 1",
    ),
    "kept otherwise": (
        lambda g: ops.meta_step(g[0], [g[1][0], g[1][1].t()], 0.5),
        ValueError,
        r"kept\[1\]: expected shape \(3, 4\) .*as parameters\[1\]\), got \(4, 3\)",
    ),
    "in a transform": (
        lambda g: torch.func.vmap(lambda x: ops.meta_step([x], [x], 0.5))(g[0][1]),
        RuntimeError,
        "^fastdg::meta_step: .*transforms",
    ),
    "no gradient": (
        lambda g: ops.gram([[g[0][0], None], g[1]]),
        TypeError,
        r"^gradients\[0\]\[1\]: .*got NoneType",
    ),
    "a dictionary": (
        lambda g: ops.combine({"weight": g[0]}, torch.ones(1)),
        TypeError,
        r"^gradients\[0\]: .*got str",
    ),
    "arguments in another order": (
        lambda g: ops.combine(torch.ones(2), g),
        TypeError,
        r"^gradients\[0\]: ",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_named(what: str) -> None:
    run, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        run([[torch.randn(5), torch.randn(3, 4)] for _ in range(2)])


def test_transforms_go_through(device: str) -> None:
    stacks = [torch.randn(5, 3, 7, device=device) for _ in range(2)]  # five sets of three domains
    weights = torch.tensor([1.0, -1.0, 2.0], device=device)
    functions: list[Callable[..., object]] = [
        lambda x, y: ops.gram([[x[d], y[d]] for d in range(3)]),
        lambda x, y: ops.combine([[x[d], y[d]] for d in range(3)], weights),
        lambda x, y: ops.agreement([[x[d], y[d]] for d in range(3)], weights, 0.5),
    ]
    for function in functions:
        got = torch.utils._pytree.tree_leaves(torch.func.vmap(function)(*stacks))
        for i in range(5):
            wanted = torch.utils._pytree.tree_leaves(function(stacks[0][i], stacks[1][i]))
            torch.testing.assert_close([out[i] for out in got], wanted)
