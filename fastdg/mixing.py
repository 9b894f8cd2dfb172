"""One teacher of several, one prediction of several students."""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import to_statistics_dtype


def mix_teachers(*logits: Tensor) -> Tensor:
    r"""One teacher of several, as the paper mixes them: the mean of their logits ``[N, C]``.

    .. math:: t = \tfrac1M \sum_m t^{(m)}

    Args:
        logits: of each teacher, of one shape.

    Raises:
        TypeError, ValueError: the shapes differ, or there are none.
    """
    return _stacked(logits).mean(0)


def mix_students(*logits: Tensor) -> Tensor:
    r"""One prediction of several students, as the paper's code mixes them: the sum of their
    softmaxes ``[N, C]``.

    .. math:: p = \sum_m \operatorname{softmax}(z^{(m)})

    There each student has an optimizer and a teacher of its own (ViT-B/16; ResNet-101), and
    ``relative=0``. The sum over classes is the number of students.

    Args:
        logits: of each student, of one shape.

    Raises:
        TypeError, ValueError: the shapes differ, or there are none.
    """
    return _stacked(logits).softmax(-1).sum(0)


def _stacked(logits: tuple[Tensor, ...]) -> Tensor:
    for x in logits:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"logits: expected a tensor (N, C) for each argument, got {type(x).__name__}. "
                "Unpack a list: (*logits)."
            )
    shapes = {tuple(x.shape) for x in logits}
    if len(shapes) != 1:
        got = ", ".join(map(str, sorted(shapes))) or "none"
        raise ValueError(f"logits: expected tensors of one shape, got {got}.")
    return torch.stack([to_statistics_dtype(x) for x in logits])
