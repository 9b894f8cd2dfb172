"""Never silently wrong: captured per-sample gradients against autograd's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .collect import collect, gradients_of
from .factors import Factor, weighted_sum
from .tape import Found

# Relative to what rounding can do: the sum of the norms of what is added up.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def verify(
    losses: Tensor,
    found: Found,
    owned: dict[int, dict[str, str]],
    parameters: Mapping[str, Tensor],
) -> None:
    r"""Compare :math:`\sum_i w_i g_i` with autograd's gradient of :math:`\sum_i w_i \ell_i`,
    random :math:`w`.

    Equal sums alone would not notice samples that are mixed up; random weights do: a sample axis
    elsewhere,
    tokens folded into the batch in another order, samples that influence each other. It costs two
    further backward passes, once.

    Raises:
        RuntimeError: a parameter's gradients do not agree; names it and the likely cause.
    """
    generator = torch.Generator().manual_seed(0)  # the user's random stream is not touched
    weights = 0.5 + torch.rand(losses.shape[0], generator=generator, dtype=torch.float64)
    w = weights.to(losses)
    expected = dict(
        zip(parameters, gradients_of(losses, list(parameters.values()), w), strict=True)
    )
    got: dict[str, Tensor] = {}
    scale: dict[str, Tensor] = {}

    def consume(name: str, factor: Factor) -> None:
        with torch.no_grad():
            got[name] = weighted_sum(factor, w)
            scale[name] = (factor.norms().sqrt() * w).sum()

    with torch.no_grad():
        select: Callable[[str], bool] = parameters.__contains__
        collect(losses, found, owned, select, consume, retain_graph=True)
    worst = max((float(s) for s in scale.values()), default=0.0)
    dtypes = {output[1] for call in found.calls for output in call.outputs if output is not None}
    tolerance = max(TOLERANCE.get(dtype, 1e-4) for dtype in (*dtypes, losses.dtype))
    for name, parameter in parameters.items():
        reference = expected[name]
        reference = torch.zeros_like(parameter) if reference is None else reference
        if reference.layout != torch.strided:
            reference = reference.to_dense()
        captured = got.get(name, torch.zeros_like(parameter))
        size = max(float(scale.get(name, 0.0)), float(reference.norm()), 1e-3 * worst)
        error = float((captured.to(reference.dtype) - reference).norm())
        if error > tolerance * size:
            raise RuntimeError(_message(name, error / size, name in got, found, owned))


def _message(
    name: str, error: float, captured: bool, found: Found, owned: dict[int, dict[str, str]]
) -> str:
    callers = [call.where for call in found.calls if name in owned[id(call)].values()]
    if not captured:
        cause = "the module that owns it was not called in this forward, yet its weight was used"
    elif len(callers) > 1:
        cause = f"it is used by several calls ({'; '.join(callers)}) and somewhere else besides"
    else:
        cause = (
            f"{callers[0]} is not its only use (the weight is also used outside its module), or "
            f"the sample is "
            "not the first dimension there, or samples influence each other (batch statistics, a "
            "loss over pairs)"
        )
    return (
        f"the per-sample gradients captured for {name!r} do not add up to autograd's gradient "
        f"(relative difference {error:.1e}). Likely cause: {cause}. Leave the parameter out with "
        f"params=, "
        "use fastdg.func, or, if you know better, switch the check off with check=False."
    )
