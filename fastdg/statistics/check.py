"""A check of per-sample gradients against autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factors import PerSampleGrad, weighted_sum
from ..gradients.plain import gradients_of
from ..gradients.tape import Tape
from .record import tape_and_tensors

# Relative to the sum of the norms of all terms, which bounds the rounding error
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def check(tape: Tape, losses: Tensor) -> None:
    r"""Compare :math:`\sum_i w_i g_i` of the per-sample gradients with autograd's gradient of
    :math:`\sum_i w_i \ell_i`, for random :math:`w` (two backward passes).

    Rows and samples are matched exactly without it. It is a test for rules of your own.

    Args:
        tape: from `record`, or a wrapper's ``opt.tape``.
        losses: ``[N]``, whose graph is kept.

    Raises:
        RuntimeError: names the first parameter whose gradients do not agree.
    """
    tape, losses = tape_and_tensors((tape, losses), None, 1)
    tracked = tape.resolve(losses)
    generator = torch.Generator("cpu").manual_seed(0)  # the user's random stream is not touched
    weights = 0.5 + torch.rand(losses.shape[0], generator=generator, dtype=torch.float64)
    w = weights.to(losses)
    expected = gradients_of(losses, list(tracked.leaves.values()), w)
    got: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}

    def use(name: str, factor: PerSampleGrad) -> None:
        with torch.no_grad():
            got[name] = weighted_sum(factor, w)
            norms[name] = (factor.norms().sqrt() * w).sum()

    tracked.collect(use, retain_graph=True)
    worst = max((float(s) for s in norms.values()), default=0.0)
    for (name, p), reference in zip(tracked.leaves.items(), expected, strict=True):
        reference = torch.zeros_like(p) if reference is None else reference
        if reference.layout != torch.strided:
            reference = reference.to_dense()
        captured = got.get(name, torch.zeros_like(p))
        size = max(float(norms.get(name, 0.0)), float(reference.norm()), 1e-3 * worst)
        error = float((captured.to(reference.dtype) - reference).norm())
        dtypes = {p.dtype, losses.dtype}
        if error > max(TOLERANCE.get(dtype, 1e-4) for dtype in dtypes) * size:
            raise RuntimeError(
                f"params: the per-sample gradients of {name!r} do not add up to autograd's "
                f"gradient, relative difference {error / size:.1e}. Look at the rule that serves "
                "it, which fastdg.explain names, and at hooks on activations that change gradients."
            )
