"""The ops alone, on the layers of the models: against the library's weight gradient, and a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import DOMAINS
from torch import Tensor
from torch.nn import functional as F

from fastdg import ops

Run = Callable[[], Any]
N = 96


@dataclass(frozen=True)
class LayerShape:
    """A layer of one of the models. ``conv``: C, O, size, kernel, stride, padding; else T, I, O."""

    name: str
    linear: tuple[int, int, int] | None = None
    conv: tuple[int, int, int, int, int, int] | None = None


LAYERS = (
    LayerShape("MLP 1024→1024", linear=(1, 1024, 1024)),
    LayerShape("head 2048→345", linear=(1, 2048, 345)),
    LayerShape("ViT qkv 192→576, T=64", linear=(64, 192, 576)),
    LayerShape("ViT mlp 768→192, T=64", linear=(64, 768, 192)),
    LayerShape("MNIST_CNN conv3×3 64→128/2, 28²", conv=(64, 128, 28, 3, 2, 1)),
    LayerShape("MNIST_CNN conv3×3 128→128, 14²", conv=(128, 128, 14, 3, 1, 1)),
    LayerShape("ResNet-18 conv7×7 3→64/2, 64²", conv=(3, 64, 64, 7, 2, 3)),
    LayerShape("ResNet-18 conv3×3 64→64, 16²", conv=(64, 64, 16, 3, 1, 1)),
    LayerShape("ResNet-18 conv3×3 128→128, 8²", conv=(128, 128, 8, 3, 1, 1)),
    LayerShape("ResNet-18 conv3×3 256→256, 4²", conv=(256, 256, 4, 3, 1, 1)),
    LayerShape("ResNet-18 conv3×3 512→512, 2²", conv=(512, 512, 2, 3, 1, 1)),
)


@dataclass
class OpCase:
    """What to run on one layer, and what it amounts to.

    Attributes:
        runs: what -> function.
        flops: what -> floating-point operations of its matrix products.
        moved: what -> bytes of its operands and results.
        check: relative error of `outer_moments` in fp32 against float64.
    """

    runs: dict[str, Run]
    flops: dict[str, int]
    moved: dict[str, int]
    check: Callable[[], float]


def _partition() -> tuple[Tensor, Tensor]:
    return torch.arange(N), torch.arange(DOMAINS + 1) * (N // DOMAINS)


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _copy(nbytes: int) -> Run:
    """Reads half of the bytes and writes the other half."""
    source = torch.ones(nbytes // 8)
    target = torch.ones(nbytes // 8)
    return lambda: target.copy_(source)


def outer(layer: LayerShape) -> OpCase:
    """`outer_moments` and its backward on one layer's shapes."""
    torch.manual_seed(0)
    order, offsets = _partition()
    if layer.linear is not None:
        T, inputs, outputs = layer.linear
        a, delta = torch.randn(N, T, inputs), torch.randn(N, T, outputs)
        window: list[int] = []
        rows, columns = delta.view(-1, outputs), a.view(-1, inputs)

        def weight_gradient() -> Tensor:
            return rows.t() @ columns

    else:
        assert layer.conv is not None
        channels, outputs, size, k, s, p = layer.conv
        x = torch.randn(N, channels, size, size)
        after = (size + 2 * p - k) // s + 1
        grad = torch.randn(N, outputs, after, after)
        a, delta, window = F.pad(x, [p] * 4), grad.flatten(2).transpose(1, 2), [k, k, s, s, 1, 1]
        T, inputs = after * after, channels * k * k
        weight = torch.randn(outputs, channels, k, k)

        def weight_gradient() -> Tensor:
            wanted = (False, True, False)
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, (s, s), (p, p), (1, 1), False, (0, 0), 1, wanted
            )[1]

    arguments = (a, delta, order, offsets, window)
    mean, variance = ops.outer_moments(*arguments)
    grads = (torch.zeros(()).expand_as(mean), torch.randn_like(variance))
    unit = 2 * N * T * inputs * outputs
    moved = _nbytes(a, delta, mean, variance)

    def check() -> float:
        m, v = ops.outer_moments(a.double(), delta.double(), *arguments[2:])
        pairs = zip((m, v), ops.outer_moments(*arguments), strict=True)
        return max(((x - y).norm() / x.norm()).item() for x, y in pairs)

    backward = torch.ops.fastdg.outer_moments_backward
    return OpCase(
        runs={
            "weight gradient": weight_gradient,
            "copy": _copy(moved),
            "outer_moments": lambda: ops.outer_moments(*arguments),
            "outer_moments_backward": lambda: backward(
                *grads, a, delta, mean, *arguments[2:4], True, arguments[4]
            ),
            "outer_domain": lambda: ops.outer_domain(*arguments),
        },
        flops={
            "weight gradient": unit,
            "outer_moments": unit * (2 if T == 1 else 1),
            "outer_moments_backward": unit * (4 if T == 1 else 3),
            "outer_domain": unit,
        },
        moved={"copy": moved},
        check=check,
    )


def moments(parameters: int) -> OpCase:
    """`moments` of given per-sample gradients, against reading and writing as much."""
    torch.manual_seed(0)
    order, offsets = _partition()
    grads = torch.randn(N, parameters)
    moved = _nbytes(grads) + 2 * DOMAINS * parameters * 4
    mean, _ = ops.moments(grads, order, offsets)
    upstream = (torch.zeros(()).expand_as(mean), torch.randn_like(mean))
    backward = torch.ops.fastdg.moments_backward

    def check() -> float:
        exact = ops.moments(grads.double(), order, offsets)
        pairs = zip(exact, ops.moments(grads, order, offsets), strict=True)
        return max(((x - y).norm() / x.norm()).item() for x, y in pairs)

    return OpCase(
        runs={
            "copy": _copy(moved),
            "moments": lambda: ops.moments(grads, order, offsets),
            "moments_backward": lambda: backward(*upstream, grads, mean, order, offsets),
        },
        flops={},
        moved={"copy": moved, "moments": moved, "moments_backward": 2 * _nbytes(grads)},
        check=check,
    )


def variance_gap(shapes: tuple[tuple[int, ...], ...]) -> OpCase:
    """The penalty on the variances of several parameters at once, against reading as much."""
    torch.manual_seed(0)
    variance = [torch.rand(DOMAINS, *shape) for shape in shapes]
    history = [torch.rand_like(v) for v in variance]
    present = torch.ones(DOMAINS, dtype=torch.bool)
    moved = _nbytes(*variance, *history)
    one = torch.ones(())
    backward = torch.ops.fastdg.variance_gap_backward

    def check() -> float:
        doubles = [[t.double() for t in ts] for ts in (variance, history)]
        exact = ops.variance_gap(*doubles, present, 19.0)
        return abs(ops.variance_gap(variance, history, present, 19.0) / exact - 1).item()

    written = moved + _nbytes(*variance)
    return OpCase(
        runs={
            "copy": _copy(moved),
            "variance_gap": lambda: ops.variance_gap(variance, history, present, 19.0),
            "variance_gap_backward": lambda: backward(one, variance, history, present, 19.0),
        },
        flops={},
        moved={"copy": moved, "variance_gap": moved, "variance_gap_backward": written},
        check=check,
    )


def text_distance(B: int, C: int, A: int, E: int) -> OpCase:
    """Distances of embeddings to their texts, against reading the embeddings and their texts."""
    torch.manual_seed(0)
    embeddings, labels = torch.randn(B, E), torch.randint(C, (B,))
    classes, anchors = torch.randn(C, E), torch.randn(C, A, E)
    classes, anchors = F.normalize(classes, dim=1), F.normalize(anchors, dim=2)
    tables = classes, anchors, (anchors @ classes.unsqueeze(2)).squeeze(2).softmax(1)
    up = torch.randn(2, B)
    moved = (2 + A) * _nbytes(embeddings)
    backward = torch.ops.fastdg.text_distance_backward

    def check() -> float:
        exact = ops.text_distance(embeddings.double(), labels, *(t.double() for t in tables))
        pairs = zip(exact, ops.text_distance(embeddings, labels, *tables), strict=True)
        return max(((x - y).norm() / x.norm()).item() for x, y in pairs)

    return OpCase(
        runs={
            "copy": _copy(moved),
            "text_distance": lambda: ops.text_distance(embeddings, labels, *tables),
            "text_distance_backward": lambda: backward(*up, embeddings, labels, *tables),
        },
        flops={},
        moved={
            "copy": moved,
            "text_distance": moved,
            "text_distance_backward": moved + _nbytes(embeddings),
        },
        check=check,
    )


OPS: dict[str, Callable[[], OpCase]] = {
    **{layer.name: (lambda layer=layer: outer(layer)) for layer in LAYERS},
    "moments, P=100 000": lambda: moments(100_000),
    "text_distance, B=128": lambda: text_distance(128, 65, 3, 512),
    "variance_gap, MLP": lambda: variance_gap(((1024, 784), (1024, 1024), (10, 1024), (1024,))),
}
