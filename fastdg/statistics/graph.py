"""A forward's calls on the autograd graph: finding them, and one backward that meets them all."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.checkpoint import CheckpointFunction

from ..carried import continued
from .release import below, release
from .tape import Call, Recorder, notes_on, paused

_REENTRANT = CheckpointFunction._backward_cls


@dataclass
class Found:
    """The calls of one forward, and where their gradients arrive.

    Attributes:
        calls: in the order they were made.
        slots: graph node -> (call, which of its outputs, which output of the node).
        parents: graph node -> the nodes above it that were walked.
        leaves: tensors that a backward gives a ``.grad``, of what was walked.
        hidden: whether a reentrant checkpoint hides a part of the graph.
        whole: whether everything was walked.
    """

    calls: list[Call]
    slots: dict[Node, list[tuple[Call, int, int]]]
    parents: dict[Node, list[Node]]
    leaves: list[Tensor]
    hidden: bool
    whole: bool

    @property
    def compiled(self) -> bool:
        """Whether `torch.compile` has made a part of the graph."""
        return any(type(node).__name__ == "CompiledFunctionBackward" for node in self.parents)

    def above(self, nodes: Iterable[Node]) -> set[Node]:
        """All nodes whose gradient ``nodes`` depend on."""
        covered: set[Node] = set()
        pending = list(nodes)
        for node in pending:  # grows while we walk it
            for parent in self.parents[node]:
                if parent not in covered:
                    covered.add(parent)
                    pending.append(parent)
        return covered

    def deepest(self) -> list[Node]:
        """Nodes with no other recorded node below them: a sweep to these passes all others."""
        covered = self.above(self.slots)
        return [node for node in self.slots if node not in covered]

    def passed_by(self, root: Node) -> Collection[Node]:
        """The nodes below ``root`` that a sweep to `deepest` does not run; some that it runs, too,
        where not everything was walked."""
        if not self.whole:
            return below([root])
        return self.parents.keys() - self.above(self.deepest())

    def keep(self, calls: Sequence[Call]) -> Found:
        """Only ``calls``."""
        if len(calls) == len(self.calls):
            return self
        wanted = set(calls)
        slots = {
            node: kept
            for node, entries in self.slots.items()
            if (kept := [entry for entry in entries if entry[0] in wanted])
        }
        return replace(self, calls=list(calls), slots=slots)


def find(root: Node, recorder: Recorder, until: int | None = None) -> Found:
    """The calls on the graph below ``root``.

    ``until``: stop at the call made at that time, if no other uses its parameters.
    """
    leaves: list[Tensor] = []
    slots: dict[Node, list[tuple[Call, int, int]]] = {}
    calls: set[Call] = set()
    parents: dict[Node, list[Node]] = {root: []}
    queue = [root]
    whole, hidden = True, False
    for node in queue:  # grows while we walk it
        for owner, call, slot, nr in notes_on(node):
            if owner is recorder:
                slots.setdefault(node, []).append((call, slot, nr))
                calls.add(call)
                whole = whole and (call.time != until or _shared(call, recorder.alive))
        if not whole:
            break
        hidden = hidden or type(node) is _REENTRANT
        next_functions = node.next_functions
        if not next_functions:
            if (leaf := getattr(node, "variable", None)) is not None:
                leaves.append(leaf)
            continue
        for child, _ in next_functions:
            if child is None:
                continue
            if (above := parents.get(child)) is None:
                parents[child] = [node]
                queue.append(child)
            else:
                above.append(node)
    ordered = sorted(calls, key=lambda call: call.time)
    found = Found(ordered, slots, parents, leaves, hidden, whole)
    return _without_parametrizations(found)


def _shared(call: Call, alive: Iterable[Call]) -> bool:
    """Whether its module was called again, or a parameter of it is tied to another module."""
    own = set(call.parameters.values())
    return any(
        other.module is call.module or not own.isdisjoint(other.parameters.values())
        for other in alive
        if other is not call
    )


def _without_parametrizations(found: Found) -> Found:
    """What runs inside a parametrization sees weights, not samples: its host answers for it."""
    hidden = {
        inner
        for call in found.calls
        if (made := call.module._modules.get("parametrizations")) is not None
        for inner in made.modules()
    }
    if not hidden:
        return found
    return found.keep([call for call in found.calls if call.module not in hidden])


Visit = Callable[[Call, Sequence[Tensor]], None]


def sweep(
    losses: Tensor,
    found: Found,
    visit: Visit,
    *,
    create_graph: bool,
    retain_graph: bool,
    extra: Sequence[Tensor] = (),
    weight: Tensor | None = None,
) -> list[Tensor | None]:
    """One backward of ``losses.sum()`` that computes gradients at the recorded outputs, not at the
    weights.

    Without ``create_graph`` each call is visited the moment its output gradients are known, and
    they are let go.

    Args:
        losses: ``[N]``.
        found: what to visit.
        visit: called once a call with its output gradients, one a tensor it returned.
        create_graph: make the gradients differentiable.
        retain_graph: keep the graph for a further backward.
        extra: tensors whose ordinary gradients are wanted from the same backward.
        weight: gradient at ``losses``; default ones.

    Returns:
        The gradients of ``extra`` (None where unused).
    """
    forget = not (retain_graph or create_graph)
    waiting: dict[Call, dict[int, Tensor | None]] = {}
    entries = itertools.chain.from_iterable(found.slots.values())
    expected = Counter(call for call, _, _ in entries if len(call.outputs) > 1)

    def arrive(entries: Sequence[tuple[Call, int, int]], grads: Sequence[Tensor | None]) -> None:
        for call, slot, output_nr in entries:
            delta = grads[output_nr]
            if len(call.outputs) > 1:
                got = waiting.setdefault(call, {})
                got[slot] = delta
                if len(got) < expected[call]:
                    continue
                del waiting[call]
                if all(d is None for d in got.values()):
                    continue
                deltas = [_filled(call, i, got.get(i)) for i in range(len(call.outputs))]
            elif delta is None:
                continue
            else:
                deltas = [delta]
            call.unchanged()
            visit(call, deltas)
            if forget:
                call.forget()

    targets = list(found.slots) if create_graph else found.deepest()
    handles: list[Any] = []
    if not create_graph:
        last = set(targets)
        handles = [
            node.register_prehook(continued(partial(arrive, entries)))
            for node, entries in found.slots.items()
            if node not in last
        ]
    edges: list[GradientEdge] = [
        GradientEdge(node, nr)
        for node in targets
        for nr in sorted({nr for _, _, nr in found.slots[node]})
    ]
    for call in found.calls:  # a node that this backward frees may be visited after it
        call.wanted += 1
    try:
        with paused(), without_autocast(losses):
            grads = list(
                torch.autograd.grad(
                    losses,
                    [*edges, *extra],  # type: ignore[arg-type]
                    torch.ones_like(losses) if weight is None else weight,
                    create_graph=create_graph,
                    retain_graph=retain_graph or create_graph,
                    allow_unused=True,
                )
            )
            rest: list[Tensor | None] = list(grads[len(edges) :])
            arrived: dict[Node, dict[int, Tensor | None]] = {}
            for edge, grad in zip(edges, grads, strict=False):
                arrived.setdefault(edge.node, {})[edge.output_nr] = grad
            del grads
            with torch.set_grad_enabled(create_graph):
                for node in targets:
                    got = arrived.pop(node)
                    arrive(found.slots[node], [got.get(nr) for nr in range(max(got) + 1)])
    finally:
        for handle in handles:
            handle.remove()
        for call in found.calls:
            call.freed()
    if forget:
        assert losses.grad_fn is not None
        passed = found.passed_by(losses.grad_fn)
        release(passed)
        for node in passed:
            for _, call, _, _ in notes_on(node):
                call.forget()
    return rest


def without_autocast(losses: Any) -> AbstractContextManager[Any]:
    """Autocast off where the losses are: what a backward computes has the dtypes of its graph."""
    if isinstance(losses, Tensor) and torch.amp.is_autocast_available(losses.device.type):
        return torch.autocast(losses.device.type, enabled=False)
    return nullcontext()


def about_mean(losses: Tensor) -> float:
    """About 1 / N, a power of two: in half precision, a backward of their sum begins with it where
    that of the mean would not overflow, and what it finds is divided by it exactly."""
    return 0.5 ** (losses.shape[0] - 1).bit_length()


def root(losses: Tensor, scale: Tensor | None) -> Tensor | None:
    """What a backward of the sum of ``losses`` begins with under a ``torch.amp.GradScaler`` of the
    factor ``scale`` (0-dim), where it meets the numbers that a scaled backward of the mean does.
    What it finds has to be divided by it."""
    return None if scale is None else scale * about_mean(losses)


def unscaled(grad: Tensor, start: Tensor | float | None) -> Tensor:
    """``grad`` of a backward that began with ``start``, divided by it; no longer in float16, where
    it would underflow after all."""
    if start is None:
        return grad
    start = start.to(grad.device) if isinstance(start, Tensor) else start
    return (grad.float() if grad.dtype == torch.float16 else grad) / start


def _filled(call: Call, slot: int, delta: Tensor | None) -> Tensor:
    if delta is not None:
        return delta
    output = call.outputs[slot]
    if output is None:  # an output without gradient, an integer tensor for one
        return torch.empty(0, device="cpu")
    shape, dtype, device = output
    return torch.zeros(shape, dtype=dtype, device=device)
