"""The cases of every op: a new one adds its arguments here, and its public function.

All tests that go through the ops one by one read this list: registration and compilers, the fuzz,
and the arguments that Triton's kernels take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from op_cases import deal
from torch import Tensor

from fastdg import ops
from fastdg.ops.second.activation_derivative import KINDS


def arguments(device: str, grad: bool) -> dict[str, tuple[object, ...]]:
    order, offsets = deal((4, 0, 2), device)
    a = torch.randn(6, 3, 4, device=device, requires_grad=grad)
    delta = torch.randn(6, 5, 3, device=device).transpose(1, 2).requires_grad_(grad)
    x = torch.randn(6, 2, 5, 4, device=device, requires_grad=grad)
    out = torch.randn(6, 9, 3, device=device, requires_grad=grad)
    window = [3, 2, 1, 1, 1, 1]
    wider = torch.randn(6, 35, 3, device=device, requires_grad=grad)
    flat = torch.randn(6, 9, device=device, requires_grad=grad)
    short = torch.randn(6, 3, device=device, requires_grad=grad)
    variance = [torch.rand(3, n, device=device, requires_grad=grad) for n in (2, 5)]
    ema = [torch.rand(3, n, device=device) for n in (2, 5)]
    present = torch.tensor([True, False, True], device=device)
    up, wide, patch, tall = (
        torch.randn(3, *shape, device=device) for shape in ((9,), (5, 4), (3, 12), (3, 9))
    )
    scalar = torch.ones((), device=device)
    lists = [torch.randn(s, device=device, requires_grad=grad) for s in ((2, 3), (5,)) * 3]
    weights = torch.tensor([0.5, 0.0, -2.0], device=device)
    inf = float("inf")
    labels = torch.tensor([0, 1, 1, 0, 2, 1], device=device)
    tables = [torch.randn(3, *shape, device=device) for shape in ((9,), (2, 9), (2,))]
    each = torch.randn(6, device=device)
    scale = torch.randn(2, device=device)
    maps = torch.randn(6, 2, 20, device=device, requires_grad=grad)
    tokens = torch.randn(6, 3, 4, device=device).mT.requires_grad_(grad)
    planes = torch.randn(6, 2, 4, 5, device=device, requires_grad=grad)
    above = torch.randn(6, 2, 5, 4, device=device).mT
    given = torch.randn(6, 2, 2, device=device), torch.rand(6, 2, 2, device=device)
    return {
        "gram": (lists, 3),
        "combine": (lists, weights),
        "combine_rows": (variance, weights),
        "loss_sums": (each, labels, 4),
        "foreach_moments": (order, offsets, [flat], [a, flat], [delta, out[:, 0]], True),
        "foreach_moments, means": (order, offsets, [], [a], [delta], False),
        "agreement": (lists, weights, 0.5, inf),
        "agreement, soft": (lists, weights, 0.5, 3.0),
        "meta_step": (lists[:2], [x.detach() for x in lists[2:4]], 0.3),
        "outer_agreement": (a, delta, order, offsets, weights, 0.5, inf, []),
        "outer_agreement, window": (x, out, order, offsets, weights, 0.5, 3.0, window),
        "moments": (flat, order, offsets),
        "moments_backward": (up, up, flat, up, order, offsets),
        "outer_moments": (a, delta, order, offsets, []),
        "outer_moments, window": (x, out, order, offsets, window),
        "outer_moments, one position": (flat, short, order, offsets, []),
        "outer_moments_backward, one position": (
            *(tall, tall, flat, short, tall, order, offsets, True, []),
        ),
        "outer_moments_backward": (wide, wide, a, delta, wide, order, offsets, True, []),
        "outer_moments_backward, window": (
            *(patch, patch, x, out, patch, order, offsets, True, window),
        ),
        "outer_moments_backward, data": (
            *(patch, patch, x, out, patch, order, offsets, False, window),
        ),
        "outer_moments, padded": (x, wider, order, offsets, [*window, 1, 2]),
        "outer_moments_backward, padded": (
            *(patch, patch, x, wider, patch, order, offsets, True, [*window, 1, 2]),
        ),
        "outer_domain, padded": (x, wider, order, offsets, [*window, 1, 2]),
        "outer_norms, padded": (x, wider, [*window, 1, 2]),
        "outer_gram, padded": (x, wider, order, offsets, [*window, 1, 2]),
        "outer_agreement, padded": (
            *(x, wider, order, offsets, weights, 0.5, inf, [*window, 1, 2]),
        ),
        "outer_domain": (a, delta, order, offsets, []),
        "outer_domain, window": (x, out, order, offsets, window),
        "outer_norms": (a, delta, []),
        "outer_norms, window": (x, out, window),
        "outer_gram": (a, delta, order, offsets, []),
        "outer_gram, window": (x, out, order, offsets, window),
        "norm_gradients": (planes, above, *given, True, None),
        "norm_gradients, rows": (above.clone().requires_grad_(grad), above, *given, False, 0.5),
        "norm_gradients, no mean": (planes, above, None, given[1], True, None),
        "norm_gradients, no norm": (planes, above, None, None, False, None),
        "foreach_norm_gradients": (
            [planes, above],
            [above, planes],
            [given[0]] * 2,
            [given[1]] * 2,
            [],
        ),
        "foreach_norm_gradients, variances": ([planes], [above], [], [given[1]], [0.5]),
        "norm_gradients_backward": (
            flat[:, :4],
            flat[:, 4:8],
            planes,
            above,
            *given,
            True,
            *[None] * 3,
        ),
        "norm_gradients_backward, rows": (
            *(flat[:, :4], flat[:, 4:8], above.clone(), above, *given),
            False,
            *(0.5, up[0, :4], above + 1),
        ),
        "norm_gradients_backward, input": (
            *(flat[:, :4], flat[:, 4:8], planes, above, *given, True, None),
            *(up[0, :4], planes.detach() + 1),
        ),
        "activation_derivative": (flat.detach(), flat.detach() + 1, flat.detach() - 1, 0),
        "activation_derivative, tanh": (above, planes.detach(), above + 1, 1),
        "activation_derivative, silu": (planes.detach(), above, above + 1, 2),
        "attention_maps": (*torch.randn(4, 6, 4, 5, device=device), torch.float32),
        "oracle_nll": (maps, maps.detach() + 1, scale.requires_grad_(grad)),
        "oracle_nll, rows": (tokens, tokens.detach() + 1, up[0, :4]),
        "oracle_nll, no maps": (maps.detach(), maps.detach() + 1, scale),
        "oracle_nll_backward": (each, maps, maps.detach() + 1, scale, flat[:, :2]),
        "oracle_nll_backward, rows": (each, tokens, tokens.detach() + 1, up[0, :4], flat[:, :4]),
        "text_distance": (flat, labels, *tables),
        "text_distance_backward": (each, each, flat, labels, *tables),
        "variance_gap": (variance, ema, present, 2.0),
        "variance_gap, no history": (variance, [], present, 0.0),
        "variance_gap_backward": (scalar, variance, ema, present, 2.0),
    }


# Op -> arguments that may be bfloat16 or float16, while the statistics of it are float32
OPERANDS = {
    "moments": (0,),
    "outer_moments": (0, 1),
    "outer_domain": (0, 1),
    "outer_norms": (0, 1),
    "outer_gram": (0, 1),
    "outer_agreement": (0, 1),
    "norm_gradients": (0, 1),
    "foreach_moments": (2, 3, 4),
    "loss_sums": (0,),
    "foreach_norm_gradients": (0, 1),
    "moments_backward": (2,),
    "outer_moments_backward": (2, 3),
    "norm_gradients_backward": (2, 3, 8, 9),
    "activation_derivative": (0, 1, 2),
}


def differentiable(name: str) -> bool:
    once = ("moments", "norm_gradients", "oracle_nll", "outer_moments", "text_distance")
    return name.split(",")[0] in (*once, "variance_gap")


def domains(flat: list[Tensor], D: int) -> list[list[Tensor]]:
    P = len(flat) // D
    return [flat[d * P : (d + 1) * P] for d in range(D)]


def meta_step(parameters: list[Tensor], kept: list[Tensor], rate: float) -> list[Tensor]:
    """On copies: what it changes is part of the result."""
    parameters, kept = [p.clone() for p in parameters], [k.clone() for k in kept]
    length = ops.meta_step(parameters, kept, rate)
    return [length, *parameters, *kept]


def norm_gradients(*args: Any) -> tuple[Tensor, Tensor]:
    return ops.norm_gradients(*args[:-2], own=args[-2], eps=args[-1])


def activation_derivative(x: Tensor, delta: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    return ops.activation_derivative(x, delta, up, KINDS[kind])


PUBLIC: dict[str, tuple[Callable[..., object], str]] = {
    "moments": (ops.moments, "moments"),
    "outer_moments": (ops.outer_moments, "outer_moments"),
    "outer_moments, window": (ops.outer_moments, "outer_moments, window"),
    "outer_moments, one position": (ops.outer_moments, "outer_moments, one position"),
    "outer_domain": (ops.outer_domain, "outer_domain"),
    "outer_norms": (ops.outer_norms, "outer_norms, window"),
    "outer_gram": (ops.outer_gram, "outer_gram"),
    "norm_gradients": (norm_gradients, "norm_gradients"),
    "norm_gradients, rows": (norm_gradients, "norm_gradients, rows"),
    "foreach_norm_gradients": (ops.foreach_norm_gradients, "foreach_norm_gradients"),
    "activation_derivative": (activation_derivative, "activation_derivative"),
    "attention_maps": (ops.attention_maps, "attention_maps"),
    "oracle_nll": (ops.oracle_nll, "oracle_nll"),
    "oracle_nll, rows": (ops.oracle_nll, "oracle_nll, rows"),
    "text_distance": (ops.text_distance, "text_distance"),
    "variance_gap": (ops.variance_gap, "variance_gap"),
    "gram": (lambda flat, D: ops.gram(domains(flat, D)), "gram"),
    "combine": (lambda flat, w: ops.combine(domains(flat, 3), w), "combine"),
    "combine_rows": (ops.combine_rows, "combine_rows"),
    "foreach_moments": (
        lambda order, offsets, grads, a, delta, variance: ops.foreach_moments(
            grads, a, delta, order, offsets, variance
        ),
        "foreach_moments",
    ),
    "agreement": (lambda flat, *args: ops.agreement(domains(flat, 3), *args), "agreement"),
    "agreement, soft": (
        lambda flat, *args: ops.agreement(domains(flat, 3), *args),
        "agreement, soft",
    ),
    "meta_step": (meta_step, "meta_step"),
    "loss_sums": (ops.loss_sums, "loss_sums"),
    "outer_agreement": (ops.outer_agreement, "outer_agreement"),
    "outer_agreement, window": (ops.outer_agreement, "outer_agreement, window"),
}


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in ``dtype``, in lists too."""
    if isinstance(x, (list, tuple)):
        return [cast(part, dtype) for part in x]
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
