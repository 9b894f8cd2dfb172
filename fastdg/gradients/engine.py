"""One backward that gives every parameter's per-sample gradients, as the graph's plan says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ..carried import continued
from ..domains import tracing
from ..statistics.factors import Factor, refuse_complex, total
from .errors import in_words
from .graph import Graph, output_shapes
from .plain import without_autocast
from .plan import Place, Plan
from .planner import Planner
from .pulled import Part, Pull, Pulled
from .reading import Reader
from .release import release
from .rules import registered

Consume = Callable[[str, Factor], None]
KEPT = 64  # signatures whose plan is remembered


@dataclass
class Forward:
    """The graph below some losses, and how each tracked parameter that it reaches is served.

    Attributes:
        losses: ``[N]``.
        graph: the graph below.
        names: of the tracked parameters that the graph reaches.
        parameters: these parameters.
        plan: how they are served.
    """

    losses: Tensor
    graph: Graph
    names: list[str]
    parameters: list[Tensor]
    plan: Plan

    def operations(self) -> list[Node]:
        """The operations where the parameters meet samples."""
        places = [place.node for places in self.plan.places.values() for place in places]
        boundaries = [boundary.node for boundary in self.plan.boundaries]
        return [self.graph.nodes[i] for i in dict.fromkeys([*places, *boundaries])]


_plans: OrderedDict[Hashable, tuple[Plan, int]] = OrderedDict()


def look(losses: Tensor, named: Mapping[str, Tensor], graph: Graph | None = None) -> Forward:
    """Plan how the parameters of a graph are served, or remember how.

    Args:
        losses: ``[N]`` with a graph.
        named: name -> parameter; those that the losses do not depend on are left out.
        graph: of ``losses.grad_fn``, where it was walked already.
    """
    if graph is None:
        assert losses.grad_fn is not None
        graph = Graph(losses.grad_fn)
    reached = {name: p for name, p in named.items() if id(p) in graph.leaves}
    names, parameters = list(reached), list(reached.values())
    signature = graph.signature(parameters)
    key = (losses.shape, losses.output_nr, losses.device, signature, registered())
    kept, uses = _plans.get(key, (None, 0))
    if tracing():  # a graph is written down, which holds for other values, too
        if kept is None:
            raise RuntimeError(
                "losses: which row belongs to which sample depends on values in this forward, or "
                "was not seen before, so that no graph can be written down; call opt.backward"
            )
        return Forward(losses, graph, names, parameters, kept)
    plan, uses = kept, uses + 1
    if plan is None or uses & (uses - 1) == 0:  # at uses 1, 2, 4, 8, ...
        for p in parameters:
            refuse_complex(p)
        with in_words():
            planner = Planner(losses, graph, parameters)
            plan = planner.plan()
            where = None if kept is None else planner.contradicts(kept)
        if where is not None:
            _plans.pop(key)
            raise RuntimeError(
                f"losses: rows of {where} belong to other samples than in the {uses - 1} steps "
                "before with the same operations and sizes, so the gradients of these steps may be "
                "wrong. Report the model to fastdg; until then make the operation that moves the "
                "rows visible, by an index_select or a mask in the forward"
            )
        if kept is not None and plan.dynamic:
            plan = kept  # a gradient that is zero this time hides where the samples are mixed
    if not plan.dynamic:
        _plans[key] = plan, uses
        _plans.move_to_end(key)
        while len(_plans) > KEPT:
            _plans.popitem(last=False)
    return Forward(losses, graph, names, parameters, plan)


def collect(
    forward: Forward,
    consume: Consume,
    *,
    selected: Callable[[str], bool] = lambda name: True,
    create_graph: bool = False,
    retain_graph: bool = True,
    extra: Sequence[Tensor] = (),
    weight: Tensor | None = None,
) -> list[Tensor | None]:
    """One backward of ``losses.sum()`` that computes no gradient of a weight, and hands the
    per-sample gradients of each selected parameter to ``consume`` as soon as they are complete.

    Args:
        forward: of the losses.
        consume: called once a parameter with its name and its `Factor`.
        selected: which names are wanted.
        create_graph: make the gradients differentiable.
        retain_graph: keep the graph for a further backward.
        extra: tensors whose ordinary gradients are wanted from the same backward.
        weight: gradient at ``losses`` ``[N]``; default ones.

    Returns:
        The gradients of ``extra``, None where unused.
    """
    if create_graph and forward.plan.zero:
        planner = Planner(forward.losses, forward.graph, forward.parameters, past_zero=True)
        forward = replace(forward, plan=planner.plan())
    sweep = _Sweep(forward, consume, selected, create_graph)
    # What rules have read already may be freed
    retain = retain_graph or create_graph or bool(sweep.pulled and forward.plan.slow)
    rest = sweep.run(weight, retain, extra)
    if not (retain_graph or create_graph):
        # Autograd frees what it runs, and it has run nothing below the last operation looked at
        passed = () if retain else forward.graph.above(sweep.last)
        release(node for node in forward.graph.nodes if node not in passed)
    return rest


class _Sweep:
    """The state of one `collect`."""

    def __init__(
        self,
        forward: Forward,
        consume: Consume,
        selected: Callable[[str], bool],
        create_graph: bool,
    ) -> None:
        self.forward, self.consume, self.create_graph = forward, consume, create_graph
        plan, graph, names = forward.plan, forward.graph, forward.names
        self.pulled = [i for i in plan.pulled if selected(names[i])]
        self.uses: dict[Node, list[tuple[int, Place]]] = {}
        self.waiting: dict[int, int] = {}
        for i, places in plan.places.items():
            if not selected(names[i]):
                continue
            self.waiting[i] = len(places)
            for place in places:
                self.uses.setdefault(graph.nodes[place.node], []).append((i, place))
        self.parts: dict[int, list[Factor]] = {}
        self.boundaries = [(graph.nodes[b.node], b) for b in plan.boundaries if self.pulled]
        self.at_boundary: dict[Node, Sequence[Tensor | None]] = {}
        self.factors: dict[Node, dict[int, Factor]] = {node: {} for node, _ in self.boundaries}
        self.saved: dict[Node, list[tuple[Any, ...]]] = {}
        self.saved_at: dict[Node, list[tuple[Any, ...] | None]] = {}
        self.boundary_of = dict(self.boundaries)
        self.readers: list[int] = []  # of what is read now

    def _read(self, node: Node) -> None:
        """Take what rules want of what ``node`` has saved."""
        self.readers = self.pulled
        if (b := self.boundary_of.get(node)) is not None:
            self.saved_at[node] = [s if s is None else s.saved(node) for s in b.served]
        if uses := self.uses.get(node, ()):
            self.readers = [i for i, _ in uses]
            self.saved[node] = [place.served.saved(node) for _, place in uses]

    def run(
        self, weight: Tensor | None, retain_graph: bool, extra: Sequence[Tensor]
    ) -> list[Tensor | None]:
        losses = self.forward.losses
        targets = list(dict.fromkeys([*self.uses, *self.factors]))
        self.last = last = self._deepest(targets)
        # A further tensor below may have the last ones called, and freed
        early = last if extra and not retain_graph else ()
        names = self.forward.names
        with in_words(lambda: [names[i] for i in self.readers]):
            # A local: as an attribute it would close a cycle, which keeps the graph until gc runs
            reader = Reader(targets, self._read, early)
        arrive = partial(self._arrive, reader)
        # What the backward goes on from is seen before users' hooks at the edge, and after at the
        # node. Only there is it the gradient; the edges are for the nodes where the backward ends.
        arrived: dict[Node, Sequence[Tensor | None]] = {}
        stay = set(last)
        handles: list[Any] = []
        for node in targets if extra else [node for node in targets if node not in stay]:
            wait = self.create_graph or node in stay
            hook = partial(arrived.__setitem__ if wait else arrive, node)
            handles.append(node.register_prehook(continued(hook)))
        edges = [
            GradientEdge(node, nr)
            for node in last
            for nr, shape in enumerate(output_shapes(node))
            if shape is not None
        ]
        if weight is None:
            weight = torch.ones_like(losses)
        with in_words(), without_autocast(losses):
            try:
                grads = torch.autograd.grad(
                    losses,
                    [*edges, *extra],  # type: ignore[arg-type]
                    weight,
                    create_graph=self.create_graph,
                    retain_graph=retain_graph,
                    allow_unused=True,
                )
            finally:  # before the backwards of `_finish`, which may pass the same nodes
                for handle in handles:
                    handle.remove()
            rest: list[Tensor | None] = list(grads[len(edges) :])
            caught: dict[Node, list[Tensor | None]] = {}
            for edge, grad in zip(edges, grads, strict=False):
                of_node = caught.setdefault(edge.node, [None] * len(output_shapes(edge.node)))
                of_node[edge.output_nr] = grad
            del grads
            with torch.set_grad_enabled(self.create_graph):
                for node in targets if self.create_graph else last:
                    if (row := arrived.pop(node, caught.pop(node, None))) is not None:
                        arrive(node, row)
                self._finish()
        return rest

    def _deepest(self, targets: Sequence[Node]) -> list[Node]:
        """Those with no other target below them: a backward to these passes all others."""
        covered = self.forward.graph.above(targets)
        return [node for node in targets if node not in covered]

    def _arrive(self, reader: Reader, node: Node, grads: Sequence[Tensor | None]) -> None:
        reader.come_to(node)
        if node in self.factors:
            self._arrive_at_boundary(node, grads)
        delta = grads[0]
        made: dict[str, Any] = {}
        for (i, place), saved in zip(
            self.uses.get(node, ()), self.saved.pop(node, ()), strict=True
        ):
            self.waiting[i] -= 1
            parts = self.parts.setdefault(i, [])
            if delta is not None:
                parts.append(place.served.factor_beside(node, saved, delta, made))
            if not self.waiting[i] and parts:
                self.consume(self.forward.names[i], total(self.parts.pop(i)))

    def _arrive_at_boundary(self, node: Node, grads: Sequence[Tensor | None]) -> None:
        boundary = self.boundary_of[node]
        saved = self.saved_at.pop(node)
        made: dict[str, Any] = {}
        for slot, served, given in zip(boundary.slots, boundary.served, saved, strict=True):
            if served is not None and given is not None and grads[0] is not None:
                self.factors[node][slot] = served.factor_beside(node, given, grads[0], made)
        if any(served is None for served in boundary.served):
            self.at_boundary[node] = list(grads)

    def _finish(self) -> None:
        for i, parts in self.parts.items():  # some uses had no gradient
            if parts:
                self.consume(self.forward.names[i], total(parts))
        if not self.pulled:
            return
        forward = self.forward
        pull = Pull(
            [
                Part(node, boundary, self.at_boundary.get(node, ()), self.factors[node])
                for node, boundary in self.boundaries
            ],
            [forward.parameters[i] for i in self.pulled],
            forward.losses.shape[0],
        )
        cache: dict[Any, Any] = {}
        for place, i in enumerate(self.pulled):
            self.consume(forward.names[i], Pulled(pull, place, None, cache))
