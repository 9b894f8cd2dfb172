"""Tables of text embeddings of classes, and checks of labels and logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch import assert_later
from ..domains import readable
from ..dtypes import to_statistics_dtype


def unit_tables(classes: Tensor, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalise the rows of both tables to length 1; without anchors, these are ``[C, 0, E]``."""
    for name, table, dims, shape in (
        ("classes", classes, 2, "[C, E]"),
        ("anchors", anchors, 3, "[C, A, E]"),
    ):
        if name == "anchors" and table is None:
            continue
        if not isinstance(table, Tensor) or not table.is_floating_point():
            got = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(
                f"{name}: expected a floating-point tensor {shape}, got {got}. "
                "fastdg.text_tables creates both: RISE(base, embedding, *tables)."
            )
        if table.dim() != dims or 0 in table.shape:
            raise ValueError(f"{name}: expected a tensor {shape}, got {list(table.shape)}.")
    C, E = classes.shape
    if anchors is None:
        anchors = classes.new_zeros((C, 0, E))
    elif anchors.shape[0] != C or anchors.shape[2] != E:
        raise ValueError(
            f"anchors: expected [{C}, A, {E}], as classes is [{C}, {E}], got {list(anchors.shape)}."
        )
    classes = to_statistics_dtype(classes.detach())
    anchors = to_statistics_dtype(anchors.detach()).to(classes)
    for name, table in (("classes", classes), ("anchors", anchors)):
        length = table.norm(dim=-1)
        bad = ~((length > 0) & length.isfinite())
        for place in bad.nonzero().tolist():
            where = f"class {place[0]}" + (f", anchor {place[1]}," if len(place) > 1 else "")
            raise ValueError(
                f"{name}: {where} has no text, got an embedding of zeros or not finite. Embed at "
                "least one text for each."
            )
    return F.normalize(classes, dim=1), F.normalize(anchors, dim=2)


def class_ids(labels: Any, embeddings: Tensor, C: int) -> Tensor:
    """Check ``labels`` and move them to the device of ``embeddings``, int64.

    Raises:
        TypeError, ValueError: they are not one class with texts for each embedding.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1 or len(labels) != len(embeddings):
        got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected a tensor [{len(embeddings)}], got {got}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {labels.dtype}.")
    if labels.device.type != "cpu" and labels.device != embeddings.device:
        raise ValueError(
            f"labels: expected the device {embeddings.device} of the embeddings, or the CPU, "
            f"got {labels.device}."
        )
    if not readable(labels):  # checked on the device, without a wait
        inside = ((labels >= 0) & (labels < C)).all()
        assert_later(inside, f"labels: expected classes 0 to {C - 1}, which have texts")
    else:
        least, most = (int(x) for x in labels.aminmax())
        if least < 0 or most >= C:
            raise ValueError(
                f"labels: expected classes 0 to {C - 1}, which have texts, got {least} to {most}."
            )
    return labels.detach().to(embeddings.device, torch.int64, non_blocking=True)


def check_logits(logits: Any, teacher: Any, shape: tuple[int, int]) -> Tensor:
    """Check that student's and teacher's logits are ``[N, C]`` on one device; return ``logits``.

    Raises:
        TypeError, ValueError: they are not.
    """
    if logits is None:
        raise TypeError("logits: teacher_logits needs them, got None. Pass logits=logits.")
    for name, given in (("logits", logits), ("teacher_logits", teacher)):
        if not isinstance(given, Tensor) or given.shape != shape:
            got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"{name}: expected a tensor [{shape[0]}, {shape[1]}], samples and classes with "
                f"texts, got {got}."
            )
    if teacher.device != logits.device:
        raise ValueError(
            f"teacher_logits: expected the device {logits.device} of the logits, got "
            f"{teacher.device}. Move the teacher, or its output."
        )
    return logits
