"""``text_distance``: how far each sample's embedding is from its class's text, and from its place
among the texts around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .dispatch.derivatives import call, differentiable, not_differentiable
from .dispatch.registry import define

RELATIVE_SCALE = 10.0  # the paper's


def _cosines(
    embeddings: Tensor, labels: Tensor, classes: Tensor, anchors: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit embeddings ``[N, E]``, one over their lengths ``[N, 1]``, and their cosines with the
    text ``[N]`` and the anchors ``[N, A]`` of their classes; all 0 for an embedding of length 0."""
    length = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
    inverse = torch.where(length == 0, 0, 1 / length)
    unit = torch.where(length == 0, 0, embeddings / length)
    around = torch.bmm(anchors[labels], unit.unsqueeze(2)).squeeze(2)
    return unit, inverse, (unit * classes[labels]).sum(1), around


def reference(
    embeddings: Tensor, labels: Tensor, classes: Tensor, anchors: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    _, _, cosine, around = _cosines(embeddings, labels, classes, anchors)
    apart = around.softmax(1) - teacher[labels]
    return 1 - cosine, apart.square().sum(1) * (RELATIVE_SCALE / max(1, anchors.shape[1]))


def _fake(
    embeddings: Tensor, labels: Tensor, classes: Tensor, anchors: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    N = embeddings.shape[0]
    return embeddings.new_empty((N,)), embeddings.new_empty((N,))


def reference_backward(
    grad_absolute: Tensor,
    grad_relative: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    classes: Tensor,
    anchors: Tensor,
    teacher: Tensor,
) -> Tensor:
    unit, inverse, _, around = _cosines(embeddings, labels, classes, anchors)
    share = around.softmax(1)
    apart = share - teacher[labels]
    slope = share * (apart - (share * apart).sum(1, keepdim=True))
    slope = slope * (grad_relative * (2 * RELATIVE_SCALE / max(1, anchors.shape[1]))).unsqueeze(1)
    towards = torch.bmm(slope.unsqueeze(1), anchors[labels]).squeeze(1)
    towards = towards - classes[labels] * grad_absolute.unsqueeze(1)
    # The part along the embedding does not turn it. Of the rounded sum: of width 1 nothing is left
    along = (unit * towards).sum(1, keepdim=True)
    return (towards - unit * along) * inverse


def _fake_backward(
    grad_absolute: Tensor,
    grad_relative: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    classes: Tensor,
    anchors: Tensor,
    teacher: Tensor,
) -> Tensor:
    return torch.empty_like(embeddings, memory_format=torch.contiguous_format)


def check(
    embeddings: Tensor, labels: Tensor, classes: Tensor, anchors: Tensor, teacher: Tensor
) -> None:
    checks.floating("embeddings", embeddings)
    checks.dims("embeddings", embeddings, "[N, E]", 2)
    checks.vector("labels", labels, torch.int64, embeddings, "embeddings")
    checks.shape("labels", labels, embeddings.shape[:1], "N")
    for name, x in (("classes", classes), ("anchors", anchors), ("teacher", teacher)):
        checks.floating(name, x, embeddings, "embeddings")
    E = embeddings.shape[1]
    checks.dims("classes", classes, "[C, E]", 2)
    checks.dims("anchors", anchors, "[C, A, E]", 3)
    C, A = classes.shape[0], anchors.shape[1]
    checks.shape("classes", classes, (C, E), "C, E")
    checks.shape("anchors", anchors, (C, A, E), "C, A, E")
    checks.shape("teacher", teacher, (C, A), "C, A")


def check_values(embeddings: Tensor, labels: Tensor, classes: Tensor, *rest: Tensor) -> None:
    checks.label_values(labels, classes.shape[0])


def check_backward(grad_absolute: Tensor, grad_relative: Tensor, *tensors: Tensor) -> None:
    check(*tensors)
    embeddings = tensors[0]
    for name, x in (("grad_absolute", grad_absolute), ("grad_relative", grad_relative)):
        checks.floating(name, x, embeddings, "embeddings")
        checks.shape(name, x, embeddings.shape[:1], "N")


def check_values_backward(grad_absolute: Tensor, grad_relative: Tensor, *tensors: Tensor) -> None:
    check_values(*tensors)


define(
    "text_distance(Tensor embeddings, Tensor labels, Tensor classes, Tensor anchors, "
    "Tensor teacher) -> (Tensor, Tensor)",
    reference,
    _fake,
    check,
    check_values,
)
define(
    "text_distance_backward(Tensor grad_absolute, Tensor grad_relative, Tensor embeddings, "
    "Tensor labels, Tensor classes, Tensor anchors, Tensor teacher) -> Tensor",
    reference_backward,
    _fake_backward,
    check_backward,
    check_values_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_absolute: Tensor | None, grad_relative: Tensor | None
) -> tuple[Tensor, None, None, None, None]:
    embeddings = ctx.saved_tensors[0]
    zero = embeddings.new_zeros(()).expand(embeddings.shape[0])
    grad_absolute = zero if grad_absolute is None else grad_absolute
    grad_relative = zero if grad_relative is None else grad_relative
    grad = call("text_distance_backward", grad_absolute, grad_relative, *ctx.saved_tensors)
    return grad, None, None, None, None


differentiable("text_distance", _setup, _backward)
not_differentiable(
    "text_distance_backward",
    "text_distance is differentiable once. Use its result in one backward.",
)


def text_distance(
    embeddings: Tensor, labels: Tensor, classes: Tensor, anchors: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Distances of embeddings to the texts of their classes, in angles.

    .. math::
        \text{absolute}_n = 1 - \cos(s_n, T_{y_n}), \qquad
        \text{relative}_n = \frac{10}A \sum_a
            \bigl(\operatorname{softmax}_a \cos(s_n, K_{y_n a}) - q_{y_n a}\bigr)^2

    The absolute distance says how far a sample is from the text of its class; the relative one, how
    differently it and that text lie to the anchors: other texts on the same class.

    Args:
        embeddings: s ``[N, E]``, floating point. One of length 0 has cosine 0 with everything, and
            no gradient.
        labels: class y of each sample ``[N]``, int64, from 0 to C - 1. On the CPU this is checked;
            on another device labels are trusted, unless ``FASTDG_CHECK_INDICES=1`` has them read.
        classes: T ``[C, E]``, rows of length 1, of the embeddings' dtype.
        anchors: K ``[C, A, E]``, rows of length 1; ``[C, 0, E]`` for none, then the relative
            distance is 0.
        teacher: q ``[C, A]``, the softmax over a of :math:`\cos(T_c, K_{ca})`.

    Returns:
        ``(absolute, relative)``, each ``[N]``. Differentiable once with respect to ``embeddings``.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device, or a label is none of
            the classes.

    Reference:
        Huang et al.: A Sentence Speaks a Thousand Images: Domain Generalization through Distilling
        CLIP with Language Guidance, ICCV 2023.
    """
    return call("text_distance", embeddings, labels, classes, anchors, teacher)
