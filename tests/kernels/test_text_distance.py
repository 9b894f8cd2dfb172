"""The kernels of ``text_distance`` against float64: interpreted on the CPU."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
import fastdg.ops  # noqa: F401  (makes the submodule below)
from fastdg.kernels import text_distance

reference = sys.modules["fastdg.ops.text_distance"]
# The interpreter computes with NumPy, which warns of overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def texts(N: int, C: int, A: int, E: int, layout: str = "plain") -> tuple[Tensor, ...]:
    classes = F.normalize(torch.randn(C, E), dim=1)
    anchors = F.normalize(torch.randn(C, A, E), dim=2)
    teacher = (anchors * classes.unsqueeze(1)).sum(2).softmax(1)
    embeddings = torch.randn(N, E)
    if layout == "transposed":
        embeddings, anchors = embeddings.t().contiguous().t(), anchors.mT.contiguous().mT
    elif layout == "sliced":
        embeddings = torch.cat([embeddings, embeddings], 1)[:, E:]
    rest = torch.randint(C, (N,)), classes, anchors, teacher
    return tuple(x.to(DEVICE) for x in (embeddings, *rest))


def double(*args: Tensor) -> list[Tensor]:
    return [x.cpu().double() if x.is_floating_point() else x.cpu() for x in args]


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
@pytest.mark.parametrize(
    "shape",
    [(6, 3, 2, 5), (1, 1, 1, 1), (5, 2, 0, 7), (0, 3, 2, 5), (4, 3, 17, 33), (3, 2, 3, 1500),
     (3, 2, 70, 64)],
)  # fmt: skip
def test_values_and_gradients(shape: tuple[int, ...], layout: str) -> None:
    args = texts(*shape, layout)
    got = text_distance.text_distance(*args)
    for actual, want in zip(got, reference.reference(*double(*args)), strict=True):
        torch.testing.assert_close(actual.cpu().double(), want, rtol=1e-5, atol=1e-6)
    up = torch.randn(2, shape[0], device=DEVICE)
    grad = text_distance.text_distance_backward(*up, *args)
    want = reference.reference_backward(*double(*up, *args))
    assert grad.is_contiguous()
    torch.testing.assert_close(grad.cpu().double(), want, rtol=1e-4, atol=1e-6)


def test_an_embedding_of_one_number_has_no_derivative() -> None:
    args = texts(50, 4, 6, 1)
    up = torch.randn(2, 50, device=DEVICE)
    assert not text_distance.text_distance_backward(*up, *args).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_fp32(dtype: torch.dtype) -> None:
    args = [x.to(dtype) if x.is_floating_point() else x for x in texts(5, 3, 4, 40)]
    for actual, want in zip(
        text_distance.text_distance(*args), reference.reference(*double(*args)), strict=True
    ):
        assert actual.dtype == dtype
        error = (actual.cpu().double() - want).abs()
        assert (error <= torch.finfo(dtype).eps * (want.abs() + 1e-3)).all()


def test_a_label_of_no_class_gives_nan_and_reads_nothing() -> None:
    embeddings, labels, *tables = texts(4, 3, 2, 5)
    labels = torch.tensor([0, 3, -1, 1 << 40], device=DEVICE)
    up = torch.ones(4, device=DEVICE)
    results = *text_distance.text_distance(embeddings, labels, *tables), None
    grad = text_distance.text_distance_backward(up, up, embeddings, labels, *tables)
    for out in (*results[:2], grad.sum(1)):
        assert out.isfinite().tolist() == [True, False, False, False]


def test_an_embedding_of_zeros_has_no_direction() -> None:
    embeddings, *rest = texts(3, 2, 4, 9)
    embeddings[1] = 0
    absolute, relative = text_distance.text_distance(embeddings, *rest)
    up = torch.ones(3, device=DEVICE)
    grad = text_distance.text_distance_backward(up, up, embeddings, *rest)
    assert absolute[1] == 1 and relative.isfinite().all()
    assert not grad[1].any() and grad.isfinite().all()
