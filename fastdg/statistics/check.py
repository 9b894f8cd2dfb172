"""Never silently wrong: captured per-sample gradients against autograd's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .advice import LEAVE_OUT
from .collect import collect, gradients_of
from .factors import Factor, weighted_sum
from .graph import Found, root, unscaled
from .layers import rule_of
from .layers.generic import dims_by_size
from .tape import Call

# Relative to what rounding can do: the sum of the norms of what is added up.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# A gradient of zeros (behind a layer that starts at zero), infinities or a single sample show
# nothing: such a parameter is looked at again, so many times at most.
ATTEMPTS = 10


class Checks:
    """What was compared with autograd so far, so that it is done once."""

    def __init__(self) -> None:
        self.shown: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.uses: set[tuple[int, tuple[int | None, ...], bool]] = set()

    def refuse_unseen(self, names: Sequence[str]) -> None:
        """Raise if there are ``names`` of parameters in the graph that no recorded call used."""
        if names:
            raise RuntimeError(
                f"{names[0]!r} was used in this forward, but not by a call of the module that owns "
                "it: the weight was taken from there (F.linear(x, layer.weight)), the module runs "
                "under torch.compile (see fastdg.compiled), or it returned the very tensor it was "
                f"given, changed in place. {_WAYS_OUT}"
            )

    def refuse_hidden(self, names: Sequence[str]) -> None:
        """Raise if there are ``names`` of parameters that a reentrant checkpoint may hide."""
        if names:
            raise RuntimeError(
                f"{names[0]!r} was not seen, and a checkpoint with use_reentrant=True hides a part "
                f"of the graph: pass use_reentrant=False to torch.utils.checkpoint. {_WAYS_OUT}"
            )

    def verify(
        self,
        losses: Tensor,
        found: Found,
        owned: dict[Call, dict[str, str]],
        parameters: Mapping[str, Tensor],
        scale: Tensor | None = None,
    ) -> None:
        """Run `verify` if a parameter, or a way of using one, was not checked before."""
        uses = {_use(call, losses.shape[0]) for call in found.calls}
        pending = [
            name
            for name in parameters
            if name not in self.shown and self.attempts.get(name, 0) < ATTEMPTS
        ]
        if not pending and uses <= self.uses:
            return
        self.shown.update(verify(losses, found, owned, parameters, scale))
        self.uses |= uses
        for name in pending:
            self.attempts[name] = self.attempts.get(name, 0) + 1


def _use(call: Call, samples: int) -> tuple[int, tuple[int | None, ...], bool]:
    """What was inferred about a call from sizes alone: it may come out otherwise another time."""
    shape = next(filter(None, call.outputs))[0]
    dims = () if rule_of(call.module) else dims_by_size(call, (call.args, call.kwargs))
    return id(call.module), dims, not shape or shape[0] != samples


def verify(
    losses: Tensor,
    found: Found,
    owned: dict[Call, dict[str, str]],
    parameters: Mapping[str, Tensor],
    scale: Tensor | None = None,
) -> set[str]:
    r"""Compare :math:`\sum_i w_i g_i` with autograd's gradient of :math:`\sum_i w_i \ell_i`.

    Equal sums alone would not notice samples that are mixed up; random :math:`w` do: a sample axis
    elsewhere, tokens folded into the batch in another order, samples that influence each other.
    It costs two further backward passes, which run with a ``torch.amp.GradScaler``'s ``scale`` as
    those of the training do.

    Returns:
        The parameters for which this could have shown a mistake.

    Raises:
        RuntimeError: a parameter's gradients do not agree; names it and the likely cause.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # the user's random stream is not touched
    weights = 0.5 + torch.rand(
        losses.shape[0], generator=generator, dtype=torch.float64, device="cpu"
    )
    w = weights.to(losses)
    start = root(losses, scale)
    first = w if start is None else w * start
    gradients = gradients_of(losses, list(parameters.values()), first)
    expected = dict(zip(parameters, gradients, strict=True))
    got: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}

    def consume(name: str, factor: Factor) -> None:
        with torch.no_grad():
            got[name] = weighted_sum(factor, w)
            norms[name] = (factor.norms().sqrt() * w).sum()

    with torch.no_grad():
        collect(
            losses, found, owned, parameters.__contains__, consume, retain_graph=True, scale=scale
        )
    worst = max((float(s) for s in norms.values()), default=0.0)
    dtypes = {output[1] for call in found.calls for output in call.outputs if output is not None}
    tolerance = max(TOLERANCE.get(dtype, 1e-4) for dtype in (*dtypes, losses.dtype))
    shown: set[str] = set()
    for name, parameter in parameters.items():
        reference = expected[name]
        reference = torch.zeros_like(parameter) if reference is None else reference
        if reference.layout != torch.strided:
            reference = reference.to_dense()
        reference = unscaled(reference, start)
        captured = got.get(name, torch.zeros_like(parameter))
        norm = float(reference.norm())
        size = max(float(norms.get(name, 0.0)), norm, 1e-3 * worst)
        error = float((captured.to(reference.dtype) - reference).norm())
        if error > tolerance * size:
            raise RuntimeError(_message(name, error / size, found, owned, torch.float16 in dtypes))
        if losses.shape[0] > 1 and 0 < norm < float("inf"):
            shown.add(name)
    return shown


_WAYS_OUT = (
    f"Ways out: {LEAVE_OUT}; use fastdg.func; or, if you know better, switch the check off with "
    "check=False."
)


def _message(
    name: str, error: float, found: Found, owned: dict[Call, dict[str, str]], half: bool
) -> str:
    callers = dict.fromkeys(c.where for c in found.calls if name in owned[c].values())
    small = (
        "; or they are too small for float16: opt.backward(losses, domains, scaler=GradScaler())"
    )
    return (
        f"the per-sample gradients captured for {name!r} do not add up to autograd's gradient "
        f"(relative difference {error:.1e}). It was seen in: {'; '.join(callers)}. Likely causes: "
        "the weight is also used outside a call of its module (F.linear(x, layer.weight); a term "
        "of the losses in the weights themselves, for which optimizers have weight_decay); the "
        "sample is not the first dimension there (sequence first, tokens folded into the batch "
        "other than by x.view(N * T, ...)); or samples influence each other (statistics over the "
        f"batch, a loss over pairs){small if half else ''}. {_WAYS_OUT}"
    )
