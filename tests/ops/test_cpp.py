"""The compiled CPU ops against float64 references, on every instruction set this machine runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import fastdg.ops
from fastdg import native

if not native.status()[0]:
    pytest.skip(f"no compiled ops: {native.status()[1]}", allow_module_level=True)

cpp = torch.ops.fastdg_cpp
# The submodules share their names with the functions that fastdg.ops exports.
refs = {
    name: sys.modules[f"fastdg.ops.{name}"]
    for name in fastdg.ops.dispatch.registry.OPS
    if f"fastdg.ops.{name}" in sys.modules
}


def partition(counts: Sequence[int], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Samples dealt to domains of the given sizes at random; ``extra`` more belong to none."""
    total = sum(counts)
    order = torch.randperm(total + extra)[:total]
    return order, torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])


def rows(N: int, T: int, I: int, O: int, layout: str = "plain") -> tuple[Tensor, Tensor, list[int]]:  # noqa: E741
    """Rows ``a``, gradients ``delta`` and no window; ``layout`` says how they lie in memory."""
    a, delta = torch.randn(N, T, I) + 0.5, torch.randn(N, T, O)
    if layout == "transposed":
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
        delta = delta.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        a = torch.randn(N, T, 2 * I + 1)[..., 1::2]
        delta = torch.randn(2 * N, T + 3, O + 5)[::2, 3:, 5:]
    elif layout == "columns":
        a = torch.randn(N, T, 3 * I)[..., I : 2 * I]
    elif layout == "expanded":
        delta = delta[:, :1].expand(N, T, O)
    return a, delta, []


def conv(
    N: int,
    C: int,
    O: int,  # noqa: E741
    size: Sequence[int],
    window: Sequence[int],
    layout: str = "plain",
) -> tuple[Tensor, Tensor, list[int]]:
    """A padded convolution input, gradients at the outputs and the window."""
    a = torch.randn(N, C, *size) + 0.5
    if layout == "channels_last":
        a = a.contiguous(memory_format=torch.channels_last)
    T, _ = fastdg.ops.window.sizes(a.shape, window)
    delta = torch.randn(N, O, T).transpose(1, 2)
    return a, delta, list(window)


# name -> (arguments, sizes of the domains)
CASES = {
    "linear, T=1": (lambda: rows(11, 1, 37, 19), (4, 1, 6)),
    "linear, T=1, wide": (lambda: rows(9, 1, 530, 70), (5, 4)),
    "linear, T=1, one output": (lambda: rows(7, 1, 3, 1), (3, 4)),
    "linear, T=1, one input": (lambda: rows(7, 1, 1, 5), (3, 4)),
    "linear, T=1, sliced": (lambda: rows(9, 1, 20, 33, "sliced"), (2, 7)),
    "linear, T=1, more samples than a chunk": (lambda: rows(560, 1, 9, 5), (300, 260)),
    "linear, T=1, few outputs": (lambda: rows(11, 1, 96, 5), (4, 1, 6)),
    "linear, T=1, few outputs, columns": (lambda: rows(560, 1, 544, 6, "columns"), (300, 250)),
    "linear, T=1, two tiles of outputs": (lambda: rows(20, 1, 1040, 12, "columns"), (9, 11)),
    **{
        f"linear, T={T}, few outputs": (lambda T=T: rows(8, T, 48, 3, "columns"), (3, 5))
        for T in (2, 3, 8)
    },
    "linear, T=2": (lambda: rows(10, 2, 21, 40), (3, 0, 7)),
    "linear, T=7": (lambda: rows(12, 7, 40, 10), (3, 4, 5)),
    **{f"linear, T={T}": (lambda T=T: rows(8, T, 37, 11), (3, 5)) for T in (3, 4, 5, 6, 8)},
    "linear, T=4, more samples than a chunk": (lambda: rows(110, 4, 50, 21), (80, 30)),
    "linear, T=4, past the caches": (lambda: rows(3, 4, 1040, 1030), (1, 2)),
    "linear, T=3, in parts": (lambda: rows(60, 3, 1300, 40), (47, 13)),
    "linear, T=17": (lambda: rows(6, 17, 24, 48), (1, 5)),
    "linear, T=33, transposed": (lambda: rows(6, 33, 13, 29, "transposed"), (2, 4)),
    "linear, T=5, sliced": (lambda: rows(6, 5, 13, 29, "sliced"), (2, 4)),
    "linear, T=65, expanded": (lambda: rows(6, 65, 20, 16, "expanded"), (2, 4)),
    "linear, T=300": (lambda: rows(5, 300, 5, 3), (2, 3)),
    "conv 3x3": (lambda: conv(7, 3, 20, (8, 9), (3, 3, 1, 1, 1, 1)), (3, 4)),
    "conv 3x3, stride 2, dilation 2": (
        lambda: conv(7, 5, 33, (11, 13), (3, 3, 2, 2, 2, 2)),
        (3, 4),
    ),
    "conv 3x3, channels_last": (
        lambda: conv(7, 4, 8, (6, 6), (3, 3, 1, 1, 1, 1), "channels_last"),
        (3, 4),
    ),
    "conv 3x3 on 2x2": (lambda: conv(9, 40, 36, (4, 4), (3, 3, 1, 1, 1, 1)), (4, 5)),
    "conv, one position": (lambda: conv(7, 4, 8, (3, 3), (3, 3, 1, 1, 1, 1)), (3, 4)),
    "conv 1x1": (lambda: conv(6, 18, 17, (5, 5), (1, 1, 1, 1, 1, 1)), (2, 4)),
    "conv 4x4 patches": (lambda: conv(6, 3, 24, (16, 16), (4, 4, 4, 4, 1, 1)), (2, 4)),
    "conv 1d": (lambda: conv(6, 3, 7, (50,), (5, 2, 1)), (2, 4)),
    "conv 3d": (lambda: conv(5, 2, 6, (4, 5, 6), (2, 3, 2, 1, 1, 2, 1, 1, 1)), (2, 3)),
    "depthwise": (lambda: conv(12, 1, 1, (7, 7), (3, 3, 1, 1, 1, 1)), (4, 4, 4)),
    "samples of no domain": (lambda: rows(9, 4, 12, 20), (3, 2)),
    "samples of no domain, T=1": (lambda: rows(9, 1, 12, 20), (3, 2)),
    "only empty domains": (lambda: rows(3, 4, 6, 5), (0, 0)),
    "no samples": (lambda: rows(0, 4, 6, 5), (0, 0)),
    "no samples, T=1": (lambda: rows(0, 1, 6, 5), (0,)),
    "no positions": (lambda: rows(4, 0, 6, 5), (2, 2)),
    "no inputs": (lambda: rows(4, 3, 0, 5), (2, 2)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    build, counts = CASES[request.param]
    a, delta, window = build()
    return a, delta, *partition(counts, a.shape[0] - sum(counts)), window


def assert_near(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    """Equal to float64's result within 2e-6 of the norm (of ``scale``, where that is larger)."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    norm = (expected if scale is None else scale).norm().item()
    assert (actual - expected).norm().item() <= 2e-6 * norm


def double(*tensors: Tensor) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in tensors]


def test_outer_moments(isa: str, case: tuple) -> None:
    *tensors, window = case
    mean, variance = cpp.outer_moments(*tensors, window)
    expected_mean, expected_variance = refs["outer_moments"].reference(*double(*tensors), window)
    assert_near(mean, expected_mean)
    assert_near(variance, expected_variance, expected_variance + expected_mean.square())
    assert (variance >= 0).all()
    for domain, count in enumerate(tensors[3].diff().tolist()):
        if count <= 1:
            assert (variance[domain] == 0).all()


def test_outer_moments_backward(isa: str, case: tuple) -> None:
    a, delta, order, offsets, window = case
    mean, _ = cpp.outer_moments(a, delta, order, offsets, window)
    up = torch.randn_like(mean), torch.randn_like(mean).transpose(1, 2).contiguous().transpose(1, 2)
    doubles = double(*up, a, delta, mean, order, offsets)
    for of_a in (True, False):
        got = cpp.outer_moments_backward(*up, a, delta, mean, order, offsets, of_a, window)
        expected = refs["outer_moments"].reference_backward(*doubles, of_a, window)
        for actual, want in zip(got, expected, strict=True):
            assert_near(actual, want)


def test_outer_domain(isa: str, case: tuple) -> None:
    *tensors, window = case
    expected = refs["outer_domain"].reference(*double(*tensors), window)
    assert_near(cpp.outer_domain(*tensors, window), expected)


def assert_agreement(tensors: Sequence[Tensor], window: list[int]) -> None:
    """Against the mask on the domains' gradients as `outer_domain` has them, so of equal signs."""
    counts = tensors[3].diff()
    weights = torch.linspace(0.5, 1.5, len(counts)) * (counts > 0)
    means = cpp.outer_domain(*tensors, window)
    for threshold, steepness in ((0.5, float("inf")), (0.2, 0.5)):
        got = cpp.outer_agreement(*tensors, weights, threshold, steepness, window)
        doubles = double(*means), weights.double(), threshold, steepness
        expected = refs["agreement"].reference(*doubles)
        assert_near(got[0], expected[0][0])
        assert_near(got[1], expected[1][0])
        assert_near(got[2], expected[2][0])


def test_outer_agreement(isa: str, case: tuple) -> None:
    *tensors, window = case
    assert_agreement(tensors, window)


@pytest.mark.parametrize("counts", [(2, 3, 1), (1,) * 64])
@pytest.mark.parametrize("kind", ["T=1", "T=3", "conv"])
def test_outer_agreement_in_blocks(isa: str, kind: str, counts: tuple[int, ...]) -> None:
    """More than one of either direction."""
    a, delta, window = {
        "T=1": lambda: rows(sum(counts), 1, 301, 263),
        "T=3": lambda: rows(sum(counts), 3, 45, 1301),
        "conv": lambda: conv(sum(counts), 150, 37, (4, 4), (3, 3, 1, 1, 1, 1)),
    }[kind]()
    assert_agreement((a, delta, *partition(counts)), window)


def test_outer_norms(isa: str, case: tuple) -> None:
    a, delta, _, _, window = case
    expected = refs["outer_norms"].reference(*double(a, delta), window)
    assert_near(cpp.outer_norms(a, delta, window), expected)


def test_equal_samples_have_no_variance(isa: str) -> None:
    a, delta = torch.randn(1, 9, 20).expand(8, 9, 20), torch.randn(1, 9, 12).expand(8, 9, 12)
    mean, variance = cpp.outer_moments(a, delta, *partition((8,)), [])
    assert (variance <= 1e-10 * mean.square().max()).all()


@pytest.mark.parametrize("T", [1, 4, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("counts", [(1, 5), (3, 3)])
def test_what_is_not_finite_comes_through(isa: str, T: int, value: float, counts: tuple) -> None:
    a, delta, window = rows(6, T, 20, 18)
    order, offsets = partition(counts)
    delta[order[0], 0, 3] = value
    for result in cpp.outer_moments(a, delta, order, offsets, window):
        assert not result[0, 3].isfinite().any()
        assert result[0, :3].isfinite().all()
        assert result[1].isfinite().all()
    assert not cpp.outer_norms(a, delta, window)[order[0]].isfinite()
    grads = torch.randn(6, 30)
    grads[order[0], 7] = value
    for result in cpp.moments(grads, order, offsets):
        assert not result[0, 7].isfinite()
        assert result.isfinite().sum() == result.numel() - 1


@pytest.mark.parametrize("counts", [(5,), (3, 0, 1, 7), (130, 300), (0,)])
@pytest.mark.parametrize("columns", [1, 15, 64, 2500])
@pytest.mark.parametrize("layout", ["plain", "strided", "transposed"])
def test_moments(isa: str, counts: tuple[int, ...], columns: int, layout: str) -> None:
    order, offsets = partition(counts, extra=2)
    grads = torch.randn(sum(counts) + 2, columns) + 1000
    if layout == "strided":
        grads = torch.cat([grads, grads], 1)[:, :columns]
    elif layout == "transposed":
        grads = grads.t().contiguous().t()
    mean, variance = cpp.moments(grads, order, offsets)
    expected = refs["moments"].reference(*double(grads[order], torch.arange(len(order)), offsets))
    assert_near(mean, expected[0])
    torch.testing.assert_close(variance.double(), expected[1], rtol=1e-4, atol=1e-7)
    up = torch.randn_like(mean), torch.randn_like(mean)
    got = cpp.moments_backward(*up, grads, mean, order, offsets)
    doubles = double(*up, grads[order], mean, torch.arange(len(order)), offsets)
    want = torch.zeros(grads.shape, dtype=torch.float64)
    want[order] = refs["moments"].reference_backward(*doubles)
    assert_near(got, want)


@pytest.mark.parametrize("present", [(True,) * 3, (True, False, True), (False,) * 3, (True,)])
@pytest.mark.parametrize("with_ema", [True, False])
def test_variance_gap(isa: str, present: tuple[bool, ...], with_ema: bool) -> None:
    shapes = [(1,), (3, 5), (0,), (20000,), (7, 11, 3)]
    D = len(present)
    variance = [torch.rand(D, *shape) for shape in shapes]
    variance[1] = variance[1].transpose(1, 2).contiguous().transpose(1, 2)
    ema = [torch.rand(D, *shape) for shape in shapes] if with_ema else []
    here = torch.tensor(present)
    gap = cpp.variance_gap(variance, ema, here, 19.0)
    doubles = double(*variance), double(*ema), here, 19.0
    assert_near(gap, refs["variance_gap"].reference(*doubles))
    grads = cpp.variance_gap_backward(torch.tensor(0.3), variance, ema, here, 19.0)
    scale = torch.tensor(0.3, dtype=torch.float64)
    want = refs["variance_gap"].reference_backward(scale, *doubles)
    assert_near(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in want]))
    assert [g.shape for g in grads] == [v.shape for v in variance]


@pytest.mark.parametrize("shape", ["conv", "rows", "wide rows", "one row", "wide"])
def test_results_do_not_depend_on_the_threads(isa: str, shape: str) -> None:
    def results() -> list[Tensor]:
        mean, variance = cpp.outer_moments(a, delta, order, offsets, window)
        up = mean, variance
        back = cpp.outer_moments_backward(*up, a, delta, mean, order, offsets, True, window)
        gap = cpp.variance_gap([variance], [], torch.ones(2, dtype=torch.bool), 0.0)
        weights = torch.tensor([0.4, 0.6])
        masked = [
            cpp.outer_agreement(a, delta, order, offsets, weights, 0.5, steepness, window)
            for steepness in (0.5, float("inf"))
        ]
        return [mean, variance, *back, gap, *masked[0], *masked[1]]

    a, delta, window = {
        "conv": lambda: conv(10, 6, 40, (9, 9), (3, 3, 1, 1, 1, 1)),
        "rows": lambda: (torch.randn(10, 5, 40), torch.randn(10, 5, 30), []),
        "wide rows": lambda: (torch.randn(10, 4, 1300), torch.randn(10, 4, 45), []),
        "one row": lambda: (torch.randn(10, 1, 700), torch.randn(10, 1, 65), []),
        "wide": lambda: (torch.randn(10, 1, 2100), torch.randn(10, 1, 33), []),
    }[shape]()
    order, offsets = partition((4, 6))
    threads = torch.get_num_threads()
    first, *others = ([torch.set_num_threads(k), results()][1] for k in (1, 2, 3))
    torch.set_num_threads(threads)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("width", [5, 16, 100])
@pytest.mark.parametrize(("level", "noise"), [(10.0, 1e-3), (5.0, 0.05)])
def test_variance_of_samples_that_hardly_differ(
    isa: str, level: float, noise: float, width: int
) -> None:
    a = level + noise * torch.randn(20, 1, width)
    a[:, :, ::3] = torch.randn(20, 1, len(range(0, width, 3)))  # others do
    delta = 0.3 + 1e-3 * noise * torch.randn(20, 1, 7)
    order, offsets = partition((8, 11, 1))
    _, variance = cpp.outer_moments(a, delta, order, offsets, [])
    _, exact = refs["outer_moments"].reference(a.double(), delta.double(), order, offsets, [])
    # What is left is the rounding of the products themselves, where there is no fused multiply-add
    assert (variance[:2] - exact[:2]).abs().le(2e-3 * exact[:2]).all()
    assert not variance[2].any()


@pytest.mark.parametrize("count", [2, 32, 600, 4000])
@pytest.mark.parametrize(("level", "noise"), [(10.0, 1e-3), (5.0, 0.05)])
def test_variance_to_the_rounding_of_the_samples(
    isa: str, level: float, noise: float, count: int
) -> None:
    a = level + noise * torch.randn(count, 1, 40)
    delta = torch.ones(count, 1, 9)  # so that no product is rounded
    order, offsets = partition((count,))
    _, variance = cpp.outer_moments(a, delta, order, offsets, [])
    _, exact = refs["outer_moments"].reference(a.double(), delta.double(), order, offsets, [])
    assert (variance - exact).abs().le(1e-4 * exact).all()


def test_a_sample_stands_in_one_domain_once(isa: str) -> None:
    a, delta = torch.randn(3, 1, 4), torch.randn(3, 1, 5)
    with pytest.raises(RuntimeError, match=r"order: .*twice"):
        cpp.outer_moments(a, delta, torch.tensor([0, 0, 2]), torch.tensor([0, 2, 3]), [])


@pytest.mark.parametrize("name", ["present", "ema", "variance"])
def test_variance_gap_takes_one_device(name: str) -> None:
    arguments = {"variance": [torch.rand(2, 3), torch.rand(2, 4)]}
    arguments |= {"ema": [torch.rand(2, 3), torch.rand(2, 4)]}
    arguments |= {"present": torch.ones(2, dtype=torch.bool)}
    here = arguments[name]
    arguments[name] = here.to("meta") if name == "present" else [here[0], here[1].to("meta")]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"{name}: expected the device of"):
        cpp.variance_gap.default.redispatch(keys, *arguments.values(), 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.randn(4, 3)}, "delta: "),
        ({"delta": torch.randn(4, 2, 5)}, "delta: "),
        ({"a": torch.randn(5, 3, 6)}, " a: "),
        ({"a": torch.randn(4, 3, 6).double()}, " a: .*float32"),
        ({"order": torch.tensor([0, 1, 2, 9])}, "order: .*9"),
        ({"offsets": torch.tensor([0, 3, 2])}, "offsets: "),
        ({"offsets": torch.tensor([0, 9])}, "offsets: "),
        ({"window": [3, 1]}, "window: "),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"a": torch.randn(4, 3, 6), "delta": torch.randn(4, 3, 5)}
    arguments |= {"order": torch.arange(4), "offsets": torch.tensor([0, 2, 4]), "window": []}
    with pytest.raises(RuntimeError, match=message):
        cpp.outer_moments(*(arguments | change).values())


def test_the_router_takes_the_compiled_ops() -> None:
    a, delta, window = rows(6, 3, 5, 4)
    order, offsets = partition((2, 4))
    for name, arguments in {
        "outer_moments": (a, delta, order, offsets, window),
        "outer_norms": (a, delta, window),
        "moments": (a[:, 0], order, offsets),
        "variance_gap": ([torch.rand(2, 3)], [], torch.tensor([True, True]), 0.0),
    }.items():
        op = fastdg.ops.dispatch.registry.OPS[name]
        assert hasattr(cpp, name)
        assert op.route(*arguments) is op.backends["cpp"][0]
        in_double = [
            x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
        ]
        if name != "variance_gap":
            assert op.route(*in_double) is op.reference
