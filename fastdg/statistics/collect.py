"""From a swept tape to one `Factor` per parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .advice import LEAVE_OUT
from .factors import Factor, total
from .graph import Found, root, sweep, unscaled, without_autocast
from .layers import rule_of, spans_samples
from .layers.generic import generic
from .modules import contents, own_parameters
from .tape import Call, paused

Consume = Callable[[str, Factor], None]


def choose_head(found: Found) -> Found:
    """Only the calls of the last module that ran; one that contains others that ran is not it, nor
    is a criterion."""
    ran = {call.module for call in found.calls}
    for call in reversed(found.calls):
        outer = any(inner in ran for inner in contents(call.module))
        if call.parameters and not outer and not call.criterion:
            return found.keep([c for c in found.calls if c.module is call.module])
    return found


def adopt(
    found: Found, names: Mapping[int, tuple[Tensor, str]], leaves: Set[int]
) -> dict[Call, dict[str, str]]:
    """Tracked parameters of each call: its own, and those of modules inside that never ran.

    `nn.MultiheadAttention` reads the weight of its output projection without calling it.

    Args:
        found: the calls.
        names: id of a parameter -> itself and its name.
        leaves: ids of those that the graph leads to.
    """
    owned = {call: call.parameters for call in found.calls}
    hosts = [c for c in found.calls if c.parameters and c.module._modules and not rule_of(c.module)]
    if not hosts:
        return owned
    ran = {call.module for call in found.calls if call.parameters}

    def silent(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, child in module._modules.items():
            if child is not None and child not in ran:
                for local, p in own_parameters(child):
                    yield f"{prefix}{name}.{local}", p
                yield from silent(child, f"{prefix}{name}.")

    for call in hosts:
        own = dict(call.parameters)
        for local, p in silent(call.module, ""):
            used = id(p) in names and p.requires_grad and (id(p) in leaves or not found.whole)
            if used and (name := names[id(p)][1]) not in own.values():
                own[local] = name
        owned[call] = own
    return owned


class MixedSamples(ValueError):
    """The gradients of single samples do not exist: the module ``where`` mixes the samples."""

    def __init__(self, where: str) -> None:
        self.where = where
        super().__init__(
            f"params: {where} normalises over the batch (training mode), so the gradients of "
            "single samples do not exist in it or in the layers before it. Ways out: freeze it "
            "with module.eval() after model.train(); use GroupNorm or LayerNorm in its place; or "
            f"{LEAVE_OUT}, with those of all layers before it."
        )

    def __reduce__(self) -> tuple[type[MixedSamples], tuple[str]]:
        return MixedSamples, (self.where,)


def refuse_mixing(found: Found, wanted: Sequence[Call]) -> None:
    """Batch statistics make the gradients of all layers below depend on all samples."""
    mixing = {call for call in found.calls if spans_samples(call.module)}
    if not mixing:
        return
    chosen = set(wanted)
    reach = found.above(found.keep(wanted).slots)
    for node, entries in found.slots.items():
        for call, _, _ in entries:
            if call in mixing and (call in chosen or node in reach):
                raise MixedSamples(call.where)


def collect(
    losses: Tensor,
    found: Found,
    owned: dict[Call, dict[str, str]],
    selected: Callable[[str], bool],
    consume: Consume,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
    extra: Sequence[Tensor] = (),
    scale: Tensor | None = None,
) -> list[Tensor | None]:
    """Sweep, and hand every selected parameter's `Factor` to ``consume`` as soon as it is complete.

    A parameter used several times is complete when its last use was visited; its gradients are
    summed first. ``scale``: the factor of a ``torch.amp.GradScaler``, which the sweep runs with and
    nothing that comes out of it has.
    """
    samples = losses.shape[0]
    start = root(losses, scale)
    inverse = None if start is None else start.reciprocal().expand(samples)
    uses = Counter(name for call in found.calls for name in owned[call].values())
    parts: dict[str, list[Factor]] = {}

    def visit(call: Call, deltas: Sequence[Tensor]) -> None:
        own = [(local, name) for local, name in owned[call].items() if selected(name)]
        if not own:
            return
        factors = _factors(call, deltas, own)
        for local, name in own:
            factor = factors.get(local)
            if factor is None:
                continue
            if factor.samples != samples:
                factor = _per_sample(call, factor, samples)
            if inverse is not None:
                factor = factor.scaled(inverse)
            if uses[name] == 1:
                consume(name, factor)
                continue
            parts.setdefault(name, []).append(factor)
            if len(parts[name]) == uses[name]:
                consume(name, total(parts.pop(name)))

    if create_graph:
        refuse_fused_attention(found)
    rest = sweep(
        losses,
        found,
        visit,
        create_graph=create_graph,
        retain_graph=retain_graph,
        extra=extra,
        weight=None if start is None else torch.ones_like(losses) * start,
    )
    for name, left in parts.items():  # some recorded uses do not lead to these losses
        consume(name, total(left))
    return [None if grad is None else unscaled(grad, start) for grad in rest]


def _factors(
    call: Call, deltas: Sequence[Tensor], own: Sequence[tuple[str, str]]
) -> dict[str, Factor]:
    rule = rule_of(call.module)
    if rule is None:
        return generic(call, deltas, [local for local, _ in own])
    return rule(call.module, call.args or tuple(call.kwargs.values()), deltas[0])


def _per_sample(call: Call, factor: Factor, samples: int) -> Factor:
    if factor.samples == 0 or factor.samples % samples:
        raise ValueError(
            f"{call.where}: its first dimension is {factor.samples}, but there are {samples} "
            "losses. Every tracked layer needs the sample in the first dimension and every sample "
            "needs one loss. Ways out: batch_first=True for sequences; the mean over a sample's "
            "tokens for losses; positions.expand(N, -1) for an input that all samples share; "
            "backward(..., final=False) for a batch run in several forwards; or "
            f"{LEAVE_OUT}."
        )
    return factor.fold(samples)


def refuse_fused_attention(found: Found) -> None:
    """The gradients' own gradients go through every operation above a tracked layer."""
    for node in found.above(found.slots):
        if type(node).__name__.startswith("ScaledDotProduct"):
            raise RuntimeError(
                "create_graph: fused attention lies between the tracked layers and the losses, and "
                "it has no second derivative. Run the model under "
                "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH); or, for the "
                f"layers before it, {LEAVE_OUT}."
            )


@contextmanager
def unhooked(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients taken inside come before any hook of these parameters changes them."""
    hooks = [(p, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for p, _ in hooks:
        p._backward_hooks.clear()  # type: ignore[union-attr]
    try:
        yield
    finally:
        for p, own in hooks:
            p._backward_hooks.update(own)  # type: ignore[union-attr]


def gradients_of(
    losses: Tensor, parameters: Sequence[Tensor], weight: Tensor, *, retain_graph: bool = True
) -> list[Any]:
    """Autograd's own gradients of ``(weight * losses).sum()``, before any hook changes them."""
    with unhooked(parameters), paused(), without_autocast(losses):
        grads = torch.autograd.grad(
            losses, list(parameters), weight, retain_graph=retain_graph, allow_unused=True
        )
    return list(grads)
