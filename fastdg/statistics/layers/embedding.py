"""Embedding: the gradient touches only the rows that were looked up."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..factors import Factor, Lookup
from . import register_rule


@register_rule(nn.Embedding)
def embedding(module: nn.Embedding, inputs: tuple[Any, ...], delta: Tensor) -> dict[str, Factor]:
    if module.scale_grad_by_freq:
        raise ValueError(
            "Embedding: scale_grad_by_freq=True divides by counts over the whole batch, "
            "so per-sample gradients do not exist; set it to False"
        )
    index = inputs[0].flatten(1) if inputs[0].dim() > 1 else inputs[0].unsqueeze(1)
    delta = delta.flatten(1, -2) if delta.dim() > 2 else delta.unsqueeze(1)
    if module.padding_idx is not None:
        delta = delta * (index != module.padding_idx).unsqueeze(-1)
    return {"weight": Lookup(index, delta, module.num_embeddings)}
