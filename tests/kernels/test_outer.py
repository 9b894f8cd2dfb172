"""The kernels of outer products against float64: interpreted on the CPU, as they are on a GPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from fastdg import ops
from fastdg.kernels import (
    launch,
    outer_agreement,
    outer_domain,
    outer_moments,
    outer_moments_backward,
    outer_norms,
)

# The submodules share their names with the functions that fastdg.ops exports.
moments_ops = sys.modules["fastdg.ops.outer_moments"]
agreement_ops = sys.modules["fastdg.ops.outer_agreement"]
domain_ops = sys.modules["fastdg.ops.outer_domain"]
norms_ops = sys.modules["fastdg.ops.outer_norms"]
# The interpreter computes with NumPy, which warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Roundings a sum of random terms collects, and TF32 thirds instead of fp32 products, in eps.
ROUNDINGS = 16


def partition(counts: Sequence[int], extra: int) -> tuple[Tensor, Tensor]:
    """Samples dealt to domains of these sizes at random; ``extra`` more belong to none."""
    order = torch.randperm(sum(counts) + extra)[: sum(counts)]
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    return order.to(DEVICE), offsets.to(DEVICE)


def rows(N: int, T: int, inputs: int, outputs: int, layout: str = "plain") -> tuple:
    """Rows ``a``, gradients ``delta`` and no window; ``layout`` says how they lie in memory."""
    a, delta = torch.randn(N, T, inputs) + 0.5, torch.randn(N, T, outputs)
    if layout == "transposed":
        a, delta = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (a, delta))
    elif layout == "sliced":
        a = torch.randn(N, T, 2 * inputs + 1)[..., 1::2]
        delta = torch.randn(2 * N, T + 3, outputs + 5)[::2, 3:, 5:]
    elif layout == "expanded":
        delta = delta[:, :1].expand(N, T, outputs)
    return a, delta, []


def conv(N: int, C: int, outputs: int, size: Sequence[int], window: Sequence[int]) -> tuple:
    """A padded convolution input, gradients at the outputs and the window."""
    a = torch.randn(N, C, *size) + 0.5
    T, _ = ops.window.sizes(a.shape, window)
    return a, torch.randn(N, outputs, T).transpose(1, 2), list(window)


def channels_last() -> tuple:
    a, delta, window = conv(3, 6, 17, (6, 5), (3, 2, 1, 1, 1, 1))
    return a.contiguous(memory_format=torch.channels_last), delta.contiguous(), window


# name -> (arguments, sizes of the domains)
CASES: dict[str, tuple[Callable[[], tuple], tuple[int, ...]]] = {
    "T=1": (lambda: rows(11, 1, 37, 70), (4, 1, 6)),
    "T=1, one output": (lambda: rows(7, 1, 3, 1), (3, 4)),
    "T=1, many samples, sliced": (lambda: rows(80, 1, 20, 33, "sliced"), (70, 10)),
    "T=2": (lambda: rows(9, 2, 21, 40), (3, 0, 6)),
    "T=8": (lambda: rows(6, 8, 70, 10), (2, 4)),
    "T=17": (lambda: rows(6, 17, 24, 48), (1, 5)),
    "T=16, positions last": (lambda: rows(4, 16, 32, 48, "transposed"), (2, 2)),
    "T=33, transposed": (lambda: rows(5, 33, 13, 29, "transposed"), (2, 3)),
    "T=9, sliced": (lambda: rows(5, 9, 13, 29, "sliced"), (2, 3)),
    "T=65, expanded": (lambda: rows(3, 65, 20, 16, "expanded"), (1, 2)),
    "wide": (lambda: rows(2, 8, 70, 130), (2,)),
    "padded": (lambda: conv(5, 6, 7, (6, 7), (3, 3, 1, 1, 1, 1, 1, 1)), (2, 0, 3)),
    "padded, strides": (lambda: conv(4, 3, 18, (9, 4), (3, 2, 2, 1, 1, 2, 1, 2)), (1, 3)),
    "padded, few positions": (lambda: conv(4, 3, 5, (3, 3), (3, 3, 2, 2, 1, 1, 1, 1)), (3, 1)),
    "padded, 1 dimension": (lambda: conv(3, 2, 5, (11,), (4, 2, 1, 3)), (2, 1)),
    "padded, 3 dimensions": (
        lambda: conv(3, 2, 3, (4, 3, 3), (2, 3, 2, 1, 2, 1, 1, 1, 1, 1, 1, 0)),
        (2, 1),
    ),
    "padded, many taps": (lambda: conv(2, 3, 5, (8, 8), (7, 7, 2, 2, 1, 1, 3, 3)), (1, 1)),
    "padded, one place": (lambda: conv(2, 3, 5, (5, 4), (1, 1, 2, 2, 1, 1, 3, 3)), (1, 1)),
    "padded by nothing": (lambda: conv(2, 3, 5, (5, 4), (3, 3, 1, 1, 1, 1, 0, 0)), (1, 1)),
    "conv": (lambda: conv(3, 20, 18, (4, 5), (3, 3, 1, 1, 1, 1)), (1, 2)),
    "conv, stride and dilation": (lambda: conv(3, 3, 18, (8, 9), (3, 2, 2, 3, 2, 1)), (1, 2)),
    "conv, channels last": (channels_last, (1, 2)),
    "conv, one position": (lambda: conv(4, 4, 8, (3, 3), (3, 3, 1, 1, 1, 1)), (2, 2)),
    "conv 1x1": (lambda: conv(4, 18, 17, (4, 3), (1, 1, 1, 1, 1, 1)), (1, 3)),
    "conv 1x1, stride 2": (lambda: conv(4, 18, 17, (6, 5), (1, 1, 2, 2, 1, 1)), (1, 3)),
    "conv 1d": (lambda: conv(4, 3, 7, (20,), (5, 2, 1)), (2, 2)),
    "conv 3d": (lambda: conv(3, 2, 6, (3, 4, 5), (2, 3, 2, 1, 1, 2, 1, 1, 1)), (1, 2)),
    "depthwise": (lambda: conv(4, 1, 1, (5, 5), (3, 3, 1, 1, 1, 1)), (2, 2)),
    "samples of no domain": (lambda: rows(7, 9, 12, 20), (3, 2)),
    "samples of no domain, T=1": (lambda: rows(7, 1, 12, 20), (3, 2)),
    "empty domains": (lambda: rows(3, 8, 6, 5), (0, 0)),
    "no samples": (lambda: rows(0, 8, 6, 5), (0, 0)),
    "no samples, T=1": (lambda: rows(0, 1, 6, 5), (0,)),
    "no positions": (lambda: rows(4, 0, 6, 5), (2, 2)),
    "no inputs": (lambda: rows(4, 8, 0, 5), (2, 2)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple:
    build, counts = CASES[request.param]
    a, delta, window = build()
    order, offsets = partition(counts, a.shape[0] - sum(counts))
    return a.to(DEVICE), delta.to(DEVICE), order, offsets, window


@pytest.fixture(autouse=True)
def _fp32() -> Iterator[None]:
    """Convolutions use TF32 by default; the tolerances here are those of fp32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def double(*args: object) -> list:
    """Tensors in float64, on the CPU."""
    moved = [x.cpu() if isinstance(x, Tensor) else x for x in args]
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in moved]


def sizes(*args: object) -> list:
    """Absolute values: what they give bounds the terms of every sum."""
    return [
        x.abs() if isinstance(x, Tensor) and x.is_floating_point() else x for x in double(*args)
    ]


def assert_near(actual: Tensor, expected: Tensor, terms: Tensor) -> None:
    """Within the rounding of a sum whose terms have absolute values summing up to ``terms``."""
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected).abs()
    unit = torch.finfo(torch.float32).eps
    if actual.dtype == torch.float32:
        stored = torch.zeros_like(error)
    else:  # rounded once more, perhaps to a subnormal number
        store = torch.finfo(actual.dtype)
        stored = store.eps * (expected.abs() + store.smallest_normal)
    assert (error <= ROUNDINGS * unit * terms + stored).all()


def test_outer_moments(case: tuple) -> None:
    mean, variance = outer_moments.outer_moments(*case)
    expected = moments_ops.reference(*double(*case))
    of_mean, of_variance = moments_ops.reference(*sizes(*case))
    assert_near(mean, expected[0], of_mean)
    assert_near(variance, expected[1], of_variance + of_mean.square())
    assert (variance >= 0).all()
    assert (variance[case[3].diff() <= 1] == 0).all()


def test_outer_domain(case: tuple) -> None:
    expected = domain_ops.reference(*double(*case))
    assert_near(outer_domain.outer_domain(*case), expected, domain_ops.reference(*sizes(*case)))


@pytest.mark.parametrize("case", ["T=1", "T=2", "T=17", "conv", "empty domains"], indirect=True)
def test_sums_split_over_many_multiprocessors(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 16)
    test_outer_moments(case)
    test_outer_domain(case)
    test_outer_agreement(case, math.inf)


@pytest.fixture(params=["tile by tile", "given gradients"])
def agreement_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way of `outer_agreement`, whatever the device has room for."""
    by_tile = request.param == "tile by tile"
    monkeypatch.setattr(outer_agreement, "fills", lambda programs, device: by_tile)


@pytest.mark.product
@pytest.mark.usefixtures("agreement_kernel")
@pytest.mark.parametrize("steepness", [math.inf, 0.7])
def test_outer_agreement(case: tuple, steepness: float) -> None:
    a, *where, window = case
    counts = case[3].diff().cpu()
    weights = torch.linspace(1.5, -0.5, len(counts)).where(counts > 0, 0)
    args = a, *where, weights.to(DEVICE), 0.4, steepness, window
    got = outer_agreement.outer_agreement(*args)
    expected = agreement_ops.reference(*double(*args))
    mean, terms = domain_ops.reference(*double(*case)), domain_ops.reference(*sizes(*case))
    # A mean within its rounding of zero has either sign.
    rounding = ROUNDINGS * torch.finfo(torch.float32).eps * terms
    sure = ((mean.abs() > rounding) | (weights == 0).view(-1, 1, 1)).all(0)
    size = (weights.abs().view(-1, 1, 1) * terms).sum(0)
    assert got[0].shape == expected[0].shape
    off = (got[0].cpu().double() - expected[0]).where(sure, 0)
    assert off.norm() <= 1e-5 * size.norm()
    assert all(x.shape == () and x.dtype == torch.float32 for x in got[1:])
    assert abs(got[1].item() - expected[1]) <= 1e-5 * size.numel() + (~sure).sum()
    assert abs(got[2].item() - expected[2]) <= 1e-5 * size.sum() + size[~sure].sum()


@pytest.mark.usefixtures("agreement_kernel")
@pytest.mark.parametrize("steepness", [math.inf, 4.0])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_agreement_as_the_reference_has_it(steepness: float, value: float) -> None:
    """Domains that are absent, thresholds that are just met, and what is not finite."""
    a, delta = torch.ones(5, 1, 20, device=DEVICE), torch.ones(5, 1, 18, device=DEVICE)
    order, offsets = partition((1, 1, 1, 1, 1), 0)
    delta[order[0], 0, ::2] = -1  # 4 of 5: 0.6, in fp32
    delta[order[1], 0, ::3] = 0
    delta[order[2], 0, 4] = value
    for weights, threshold in (
        ((1, 1, 1, 1, 1), 0.6),
        ((1, 0.5, 0, -2, 1), 0.5),
        ((0, 0, 1, 0, 0), 1.0),
        ((0, 0, 0, 0, 0), 0.0),
    ):
        w = torch.tensor(weights, dtype=torch.float32, device=DEVICE)
        args = a, delta, order, offsets, w, threshold, steepness, []
        got, expected = outer_agreement.outer_agreement(*args), agreement_ops.reference(*args)
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_outer_norms(case: tuple) -> None:
    a, delta, _, _, window = case
    expected = norms_ops.reference(*double(a, delta), window)
    terms = norms_ops.reference(*sizes(a, delta), window)
    assert_near(outer_norms.outer_norms(a, delta, window), expected, terms)


def weights(case: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of mean and variance, and a mean."""
    a, delta, _, offsets, window = case
    shape = (len(offsets) - 1, delta.shape[2], ops.window.sizes(a.shape, window)[1])
    return tuple(torch.randn(3, *shape, device=DEVICE))


def check_backward(
    case: tuple, of_mean: Tensor, of_variance: Tensor, mean: Tensor, of_a: bool = True
) -> None:
    a, delta, order, offsets, window = case
    args = of_mean, of_variance, a, delta, mean, order, offsets, of_a, window
    expected = moments_ops.reference_backward(*double(*args))
    large = sizes(*args)
    large[4] = -large[4]  # it is subtracted
    terms = moments_ops.reference_backward(*large)
    for actual, want, size in zip(
        outer_moments_backward.outer_moments_backward(*args), expected, terms, strict=True
    ):
        assert actual.is_contiguous()
        assert_near(actual, want, size)


def test_outer_moments_backward(case: tuple) -> None:
    check_backward(case, *weights(case))


@pytest.mark.parametrize("case", ["T=1", "T=2", "conv 1d"], indirect=True)
def test_outer_moments_backward_of_data(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def count(kernel: object, programs: int, *args: object, **meta: object) -> None:
        launched.append(kernel.__name__)  # type: ignore[attr-defined]
        launch(kernel, programs, *args, **meta)

    launch = outer_moments_backward.launch
    monkeypatch.setattr(outer_moments_backward, "launch", count)
    check_backward(case, *weights(case), of_a=False)
    assert launched in (["_rank_one_kernel"], ["_upstream_kernel", "_grad_delta_kernel"])


@pytest.mark.parametrize("case", ["T=1", "T=2", "conv 1d"], indirect=True)
def test_outer_moments_backward_of_the_variance_alone(
    case: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient of the mean, one of the variance in another order, one sample at a time."""
    _, of_variance, mean = weights(case)
    monkeypatch.setattr(outer_moments_backward, "UPSTREAM_ELEMENTS", 2 * mean[0].numel() - 1)
    zero = torch.zeros((), device=DEVICE).expand(mean.shape)
    check_backward(case, zero, of_variance.mT.contiguous().mT, mean)


@pytest.mark.parametrize("T", [1, 4, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("counts", [(1, 4), (3, 2)])
def test_what_is_not_finite_comes_through(T: int, value: float, counts: tuple[int, ...]) -> None:
    a, delta, window = (x.to(DEVICE) if isinstance(x, Tensor) else x for x in rows(5, T, 20, 18))
    order, offsets = partition(counts, 0)
    delta[order[0], 0, 3] = value
    results = *outer_moments.outer_moments(a, delta, order, offsets, window), None
    for result in (*results[:2], outer_domain.outer_domain(a, delta, order, offsets, window)):
        assert not result[0, 3].isfinite().any()
        assert result[0, :3].isfinite().all()
        assert result[1].isfinite().all()
    norms = outer_norms.outer_norms(a, delta, window).isfinite()
    assert not norms[order[0]] and norms.sum() == 4


@pytest.mark.parametrize("T", [1, 3, 20])
def test_equal_samples_have_no_variance(T: int) -> None:
    a, delta = torch.randn(1, T, 20).expand(8, T, 20), torch.randn(1, T, 12).expand(8, T, 12)
    args = a.to(DEVICE), delta.to(DEVICE), *partition((8,), 0), []
    mean, variance = outer_moments.outer_moments(*args)
    assert (variance <= 1e-6 * mean.square().max()).all()


HALVES = [
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # not a type of the interpreter's dot
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("T", [1, 5, 20])
def test_halves_are_summed_in_fp32(dtype: torch.dtype, T: int) -> None:
    a, delta, window = rows(6, T, 20, 18)
    args = a.to(DEVICE, dtype), delta.to(DEVICE, dtype), *partition((2, 4), 0), window
    mean, variance = outer_moments.outer_moments(*args)
    assert mean.dtype == variance.dtype == torch.float32
    expected = moments_ops.reference(*double(*args))
    terms = moments_ops.reference(*sizes(*args))
    assert_near(mean, expected[0], terms[0])
    assert_near(variance, expected[1], terms[1] + terms[0].square())
    mask = torch.ones(2, device=DEVICE), 0.0, math.inf  # lets everything through
    combined, *sums = outer_agreement.outer_agreement(*args[:4], *mask, window)
    assert all(x.dtype == torch.float32 for x in (combined, *sums))
    assert_near(combined, expected[0].sum(0), terms[0].sum(0))
    assert sums[0] == combined.numel()


@pytest.mark.parametrize("T", [1, 3, 9])
@pytest.mark.parametrize("split", [1, 3])
def test_the_variance_of_samples_that_agree(
    T: int, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a small difference of large squares."""
    monkeypatch.setattr(outer_moments, "parts", lambda *args: split)
    monkeypatch.setattr(outer_domain, "parts", lambda *args: split)
    counts = (30, 1, 19)

    def near(*shape: int) -> Tensor:
        return 30 * torch.randn(1, *shape[1:]) + 0.01 * torch.randn(*shape)

    case = (near(50, T, 20), near(50, T, 7), *partition(counts, 0), ())
    case = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in case)
    mean, variance = outer_moments.outer_moments(*case)
    expected = moments_ops.reference(*double(*case))
    assert float((variance.double().cpu() - expected[1]).norm()) < 1e-3 * float(expected[1].norm())
    assert float((mean.double().cpu() - expected[0]).norm()) < 1e-6 * float(expected[0].norm())
