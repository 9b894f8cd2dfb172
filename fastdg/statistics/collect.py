"""From a swept tape to one `Factor` per parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .factors import Factor, total
from .layers import rule_of, spans_samples
from .layers.generic import generic
from .tape import Call, Found, sweep

Consume = Callable[[str, Factor], None]


def choose_head(found: Found) -> Found:
    """Only the calls of the last module that ran; a module that contains others that ran is not
    it."""
    ran = {call.module for call in found.calls}
    for call in reversed(found.calls):
        inner = set(call.module.modules()) - {call.module}
        if not inner & ran:
            return keep(found, [c for c in found.calls if c.module is call.module])
    return found


def keep(found: Found, calls: Sequence[Call]) -> Found:
    """``found`` reduced to ``calls``."""
    wanted = {id(call) for call in calls}
    slots = {
        node: [entry for entry in entries if id(entry[0]) in wanted]
        for node, entries in found.slots.items()
    }
    slots = {node: entries for node, entries in slots.items() if entries}
    deepest = [node for node in found.deepest if node in slots]
    # With inner nodes dropped, a node may have become deepest; asking for all of them is always
    # right.
    if len(slots) != len(found.slots):
        deepest = list(slots)
    return Found(list(calls), slots, deepest, found.leaves)


def adopt(found: Found, names: dict[int, str]) -> dict[int, dict[str, str]]:
    """Tracked parameters of each call: its own, and those of modules inside it that never ran
    themselves.

    `nn.MultiheadAttention` reads the weight of its output projection without calling it.
    """
    ran = {call.module for call in found.calls}
    owned: dict[int, dict[str, str]] = {}
    for call in found.calls:
        own = dict(call.parameters)
        if rule_of(call.module) is None:
            for prefix, inner in call.module.named_modules():
                if inner is call.module or inner in ran:
                    continue
                for local, p in inner._parameters.items():
                    if p is not None and p.requires_grad and id(p) in names:
                        own[f"{prefix}.{local}"] = names[id(p)]
        owned[id(call)] = own
    return owned


def refuse_mixing(found: Found) -> None:
    """Batch statistics make every sample's gradient depend on the others."""
    mixing = [call for call in found.calls if spans_samples(call.module)]
    if mixing:
        raise ValueError(
            f"params: {mixing[0].where} is a batch norm that normalises over the batch, so "
            f"per-sample "
            "gradients do not exist in the tracked part. Ways out: freeze it (module.eval()), use "
            "GroupNorm or LayerNorm, track a part without it (params='head'), or leave its "
            "parameters "
            "and the layers before it out with params=."
        )


def collect(
    losses: Tensor,
    found: Found,
    owned: dict[int, dict[str, str]],
    selected: Callable[[str], bool],
    consume: Consume,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
    extra: Sequence[Tensor] = (),
    weight: Tensor | None = None,
) -> list[Tensor | None]:
    """Sweep, and hand every selected parameter's `Factor` to ``consume`` as soon as it is complete.

    A parameter used several times is complete when its last use was visited; its gradients are
    summed first.
    """
    samples = losses.shape[0]
    uses: dict[str, int] = {}
    for call in found.calls:
        for name in owned[id(call)].values():
            uses[name] = uses.get(name, 0) + 1
    parts: dict[str, list[Factor]] = {}

    def visit(call: Call, deltas: Sequence[Tensor]) -> None:
        own = {local: name for local, name in owned[id(call)].items() if selected(name)}
        if not own:
            return
        for local, factor in _factors(call, deltas, list(own)).items():
            if local not in own:
                continue
            name = own[local]
            parts.setdefault(name, []).append(_per_sample(call, factor, samples))
            if len(parts[name]) == uses[name]:
                consume(name, total(parts.pop(name)))

    with _double_backward_advice(create_graph):
        rest = sweep(
            losses,
            found,
            visit,
            create_graph=create_graph,
            retain_graph=retain_graph,
            extra=extra,
            weight=weight,
        )
    for name, left in parts.items():  # some recorded uses do not lead to these losses
        consume(name, total(left))
    return rest


def _factors(call: Call, deltas: Sequence[Tensor], names: Sequence[str]) -> dict[str, Factor]:
    rule = rule_of(call.module)
    if rule is None or (set(call.parameters) - {"weight", "bias"} and _builtin(call.module)):
        return generic(call, deltas, names)
    inputs = call.args or tuple(call.kwargs.values())
    return rule(call.module, inputs, deltas[0])


def _builtin(module: nn.Module) -> bool:
    """A torch layer that was given further parameters (old-style weight norm) is no longer that
    layer."""
    return any(cls.__module__.startswith("torch.nn") for cls in type(module).__mro__[:-2])


def _per_sample(call: Call, factor: Factor, samples: int) -> Factor:
    if factor.samples == samples:
        return factor
    if factor.samples == 0 or factor.samples % samples:
        raise ValueError(
            f"{call.where}: its first dimension is {factor.samples}, but there are {samples} "
            f"losses. "
            "fastdg needs the sample in the first dimension of every tracked layer. A batch run "
            "in several "
            "forwards is staged piece by piece with backward(..., final=False)."
        )
    return factor.fold(samples)


@contextmanager
def _double_backward_advice(create_graph: bool) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if create_graph and "derivative for" in str(error):
            raise RuntimeError(
                f"{error}: the penalty needs a second derivative of every operation between the "
                f"tracked "
                "layers. Fused attention has none; run the model under "
                "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), or track less "
                "(params='head')."
            ) from error
        raise


def gradients_of(losses: Tensor, parameters: Sequence[Tensor], weight: Tensor) -> list[Any]:
    """Autograd's own gradients of ``(weight * losses).sum()``."""
    return list(
        torch.autograd.grad(losses, list(parameters), weight, retain_graph=True, allow_unused=True)
    )
