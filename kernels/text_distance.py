"""``text_distance``: distances of embeddings to the texts of their classes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops.text_distance import RELATIVE_SCALE
from .launch import block, launch
from .launch import supports as supports

TILE = 4096  # elements of a tile of anchors


@triton.jit
def _place(
    embedding, text, anchors, teacher, y, a, A, E, stride,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Return one over the length, the cosines with the text and the anchors, their softmax, and its
    difference to the teacher's."""
    square = 0.0
    cosine = 0.0
    around = tl.zeros((BLOCK_A,), tl.float32)
    for begin in range(0, E, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)
        s = tl.load(embedding + e * stride, mask=e < E, other=0.0).to(tl.float32)
        t = tl.load(text + e, mask=e < E, other=0.0).to(tl.float32)
        inside = (a < A)[:, None] & (e < E)[None, :]
        k = tl.load(anchors + a[:, None] * E + e[None, :], mask=inside, other=0.0)
        square += tl.sum(s * s)
        cosine += tl.sum(s * t)
        around += tl.sum(k.to(tl.float32) * s[None, :], 1)
    inverse = tl.where(square == 0.0, 0.0, 1.0 / tl.sqrt(square))
    around *= inverse
    share = tl.where(a < A, tl.exp(around), 0.0)
    share = tl.where(a < A, share / tl.sum(share), 0.0)
    apart = share - tl.load(teacher + y * A + a, mask=a < A, other=0.0).to(tl.float32)
    return inverse, cosine * inverse, around, share, apart


@triton.jit
def _text_distance_kernel(
    embeddings, labels, classes, anchors, teacher, absolute, relative,
    C, A, E, sample_stride, column_stride, scale,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Both distances of one sample; NaN for a label of no class."""
    sample = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + sample)
    known = (label >= 0) & (label < C)
    y = tl.where(known, label, 0)
    a = tl.arange(0, BLOCK_A)
    _, cosine, _, _, apart = _place(
        embeddings + sample * sample_stride, classes + y * E, anchors + y * A * E, teacher,
        y, a, A, E, column_stride, BLOCK_A, BLOCK_E,
    )  # fmt: skip
    tl.store(absolute + sample, tl.where(known, 1.0 - cosine, float("nan")))
    tl.store(relative + sample, tl.where(known, tl.sum(apart * apart) * scale, float("nan")))


@triton.jit
def _text_distance_backward_kernel(
    grad_absolute, grad_relative, embeddings, labels, classes, anchors, teacher, out,
    C, A, E, sample_stride, column_stride, scale,
    BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The gradient of one sample's embedding."""
    sample = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + sample)
    known = (label >= 0) & (label < C)
    y = tl.where(known, label, 0)
    a = tl.arange(0, BLOCK_A)
    embedding, text, around_it = embeddings + sample * sample_stride, classes + y * E, y * A * E
    inverse, cosine, around, share, apart = _place(
        embedding, text, anchors + around_it, teacher,
        y, a, A, E, column_stride, BLOCK_A, BLOCK_E,
    )  # fmt: skip
    down = tl.load(grad_absolute + sample).to(tl.float32)
    slope = share * (apart - tl.sum(share * apart))
    slope *= 2.0 * scale * tl.load(grad_relative + sample).to(tl.float32)
    along = tl.sum(slope * around) - down * cosine  # the part along the embedding turns nothing
    for begin in range(0, E, BLOCK_E):
        e = begin + tl.arange(0, BLOCK_E)
        s = tl.load(embedding + e * column_stride, mask=e < E, other=0.0).to(tl.float32)
        t = tl.load(text + e, mask=e < E, other=0.0).to(tl.float32)
        inside = (a < A)[:, None] & (e < E)[None, :]
        k = tl.load(anchors + around_it + a[:, None] * E + e[None, :], mask=inside, other=0.0)
        towards = tl.sum(k.to(tl.float32) * slope[:, None], 0) - t * down
        value = (towards - s * (inverse * along)) * inverse
        value *= tl.where(E == 1, 0.0, 1.0)  # one number has no direction: the rest is rounding
        tl.store(out + sample * E + e, tl.where(known, value, float("nan")), mask=e < E)


def _tile(anchors: int, width: int) -> dict[str, int]:
    rows = block(anchors, TILE, 1)
    return {"BLOCK_A": rows, "BLOCK_E": block(width, max(16, min(1024, TILE // rows)))}


def text_distance(
    embeddings: Tensor, labels: Tensor, classes: Tensor, anchors: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """See `fastdg.ops.text_distance`. A label of no class gives NaN."""
    N, E = embeddings.shape
    C, A = anchors.shape[:2]
    absolute, relative = embeddings.new_empty((N,)), embeddings.new_empty((N,))
    launch(
        _text_distance_kernel, N, embeddings, labels.contiguous(), classes.contiguous(),
        anchors.contiguous(), teacher.contiguous(), absolute, relative,
        C, A, E, *embeddings.stride(), RELATIVE_SCALE / max(1, A), **_tile(A, E),
    )  # fmt: skip
    return absolute, relative


def text_distance_backward(
    grad_absolute: Tensor,
    grad_relative: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    classes: Tensor,
    anchors: Tensor,
    teacher: Tensor,
) -> Tensor:
    """Return the gradient of `text_distance`, which computes the cosines anew."""
    N, E = embeddings.shape
    C, A = anchors.shape[:2]
    out = embeddings.new_empty((N, E))
    launch(
        _text_distance_backward_kernel, N, grad_absolute.contiguous(), grad_relative.contiguous(),
        embeddings, labels.contiguous(), classes.contiguous(), anchors.contiguous(),
        teacher.contiguous(), out,
        C, A, E, *embeddings.stride(), RELATIVE_SCALE / max(1, A), **_tile(A, E),
    )  # fmt: skip
    return out
