"""One backward that computes the per-sample gradients of all parameters, by the graph's plan."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ..carried import continued
from ..domains import tracing
from ..dtypes import refuse_complex
from ..factors import PerSampleGrad
from .by_autograd import BoundaryBackward, BoundaryGradients, ByAutograd
from .derivatives import OWN, NormBackward, OwnDerivative
from .errors import in_words
from .graph import Graph, Key
from .plain import without_autocast
from .plan import Plan, Route
from .planner import Planner
from .reading import Reader
from .release import release
from .route import route_of
from .rules.registry import registered

Consume = Callable[[str, PerSampleGrad], None]
MOST_PLANS = 64  # cached plans


@dataclass
class Forward:
    """The graph below some losses, and the plan for the tracked parameters in it.

    Attributes:
        losses: ``[N]``.
        graph: the graph below the losses.
        names: names of the tracked parameters in the graph.
        parameters: these parameters.
        plan: how their gradients are computed.
    """

    losses: Tensor
    graph: Graph
    names: list[str]
    parameters: list[Tensor]
    plan: Plan

    def route(self) -> Route:
        """Return the way of the backward, the same for all graphs of the plan."""
        if self.plan.route is None:
            self.plan.route = route_of(self.plan, self.graph)
        return self.plan.route

    def operations(self) -> list[Node]:
        """Return the operations where the parameters meet samples."""
        uses = [use.node for uses in self.plan.rule_uses.values() for use in uses]
        boundaries = [boundary.node for boundary in self.plan.boundaries]
        return [self.graph.nodes[i] for i in dict.fromkeys([*uses, *boundaries])]

    def called(self) -> list[Node]:
        """Return the operations that are called for each domain or sample: slow boundaries, and
        the way from these to the parameters."""
        graph, slow = self.graph, [self.graph.nodes[b.node] for b in self.plan.slow]
        leaves = [graph.leaves[id(self.parameters[i])] for i in self.plan.by_autograd]
        found, way = dict.fromkeys(slow), graph.above(leaves) if slow else {}
        for node in (pending := list(found)):  # grows while we walk it
            for child, _ in node.next_functions:
                if child in way and child not in found:
                    found[child] = None
                    pending.append(child)
        return pending


@dataclass
class _CachedPlan:
    """Cached plan, and the number of graphs with its signature so far."""

    key: Key
    plan: Plan
    uses: int = 0


_plans: OrderedDict[Key, _CachedPlan] = OrderedDict()


def plan_gradients(
    losses: Tensor, named: Mapping[str, Tensor], graph: Graph | None = None
) -> Forward:
    """Plan how the gradients of a graph's parameters are computed, or look the plan up.

    Args:
        losses: ``[N]`` with a graph.
        named: name -> parameter; parameters outside the graph are ignored.
        graph: graph of ``losses.grad_fn``, if already walked.
    """
    if graph is None:
        assert losses.grad_fn is not None
        graph = Graph(losses.grad_fn)
    reached = {name: p for name, p in named.items() if id(p) in graph.leaves}
    names, parameters = list(reached), list(reached.values())
    signature = graph.signature(parameters)
    key = Key(losses.shape, losses.output_nr, losses.device, signature, registered())
    cached = _plans.get(key)
    if tracing():  # the traced graph must hold for other values too
        if cached is None:
            raise RuntimeError(
                "losses: the samples of rows depend on values in this forward, or no earlier step "
                "has found them, so the step cannot be traced. Call opt.backward instead."
            )
        return Forward(losses, graph, names, parameters, cached.plan)
    uses = 1 if cached is None else cached.uses + 1
    if cached is not None and uses & (uses - 1):
        cached.uses = uses
        _plans.move_to_end(cached.key)
        return Forward(losses, graph, names, parameters, cached.plan)
    for p in parameters:  # at uses 1, 2, 4, 8, ...
        refuse_complex(p)
    with in_words():
        planner = Planner(losses, graph, parameters)
        plan = planner.plan()
        where = None if cached is None else planner.contradicts(cached.plan)
    if where is not None:
        _plans.pop(key)
        raise RuntimeError(
            f"losses: rows of {where} belong to other samples than in the {uses - 1} earlier steps "
            "with the same operations and sizes, so the gradients of these steps may be wrong. "
            "Report the model to fastdg. Until then, move the rows by an index_select or a mask "
            "in the forward."
        )
    if cached is not None and plan.dynamic:
        plan = cached.plan  # a gradient of zero can hide a mix of samples
    if not plan.dynamic:
        _plans[key] = _CachedPlan(key if cached is None else cached.key, plan, uses)
        _plans.move_to_end(key)
        while len(_plans) > MOST_PLANS:
            _plans.popitem(last=False)
    return Forward(losses, graph, names, parameters, plan)


def collect(
    forward: Forward,
    consume: Consume,
    *,
    create_graph: bool = False,
    retain_graph: bool = True,
    extra: Sequence[Tensor] = (),
    weight: Tensor | None = None,
    to_grad: float | Tensor | None = None,
) -> list[Tensor | None]:
    """Run one backward of ``losses.sum()`` without weight gradients, and call ``consume`` with the
    per-sample gradients of each parameter as soon as they are complete.

    Args:
        forward: the plan of the losses.
        consume: called once per parameter, with its name and `PerSampleGrad`.
        create_graph: make the gradients differentiable.
        retain_graph: keep the graph for a further backward.
        extra: tensors whose ordinary gradients the same backward computes.
        weight: gradient at ``losses`` ``[N]``; default: ones.
        to_grad: add to the ``.grad`` of every leaf, too, as a training step's backward does, and
            multiply by this what the rules see of it (a number, 0-dim); for a plan of rules alone.

    Returns:
        The gradients of ``extra``, None where unused.
    """
    if create_graph and forward.plan.zero:
        planner = Planner(forward.losses, forward.graph, forward.parameters, past_zero=True)
        forward = replace(forward, plan=planner.plan())
    backward = _Backward(forward, consume, create_graph, to_grad)
    # The backward may free tensors that rules have read, but not tensors that the
    # backwards from boundaries need
    slow = forward.plan.slow or extra
    retain = retain_graph or create_graph or bool(forward.plan.by_autograd and slow)
    extra_grads = backward.run(weight, retain, extra)
    if not (retain_graph or create_graph or backward.to_grad):
        # Autograd frees the nodes that it runs, and runs none below the last target
        nodes = forward.graph.nodes
        release(nodes if retain else [nodes[at] for at in backward.route.idle])
    return extra_grads


class _Backward:
    """State of one `collect`."""

    def __init__(
        self,
        forward: Forward,
        consume: Consume,
        create_graph: bool,
        to_grad: float | Tensor | None,
    ) -> None:
        self.forward, self.consume, self.create_graph = forward, consume, create_graph
        self.to_grad, self.factor = to_grad is not None, to_grad
        plan, nodes = forward.plan, forward.graph.nodes
        self.route = route = forward.route()
        self.uses = {nodes[at]: uses for at, uses in route.uses.items()}
        self.waiting = dict(route.parts)
        self.sums: dict[int, PerSampleGrad] = {}  # of a parameter's uses so far
        self.boundaries = [(nodes[b.node], b) for b in plan.boundaries if plan.by_autograd]
        self.at_boundary: dict[Node, Sequence[Tensor | None]] = {}
        self.factors: dict[Node, dict[int, PerSampleGrad]] = {n: {} for n, _ in self.boundaries}
        self.saved: dict[Node, list[tuple[Any, ...]]] = {}
        self.saved_at: dict[Node, list[tuple[Any, ...] | None]] = {}
        self.boundary_of = dict(self.boundaries)
        self.made: dict[Node, dict[str, Any]] = {}  # of norms, while the backward runs
        self.reading: Node | None = None

    def _read(self, node: Node) -> None:
        """Read the saved tensors of ``node`` that rules need."""
        self.reading = node
        if (b := self.boundary_of.get(node)) is not None:
            self.saved_at[node] = [s if s is None else s.saved(node) for s in b.rules]
        if uses := self.uses.get(node):
            self.saved[node] = [use.rule.saved(node) for _, use in uses]

    def _readers(self) -> list[str]:
        """Return the names of the parameters whose tensors are read now."""
        uses = self.uses.get(self.reading, ()) if self.reading is not None else ()
        indices = [i for i, _ in uses] or self.forward.plan.by_autograd
        return [self.forward.names[i] for i in indices]

    def run(
        self, weight: Tensor | None, retain_graph: bool, extra: Sequence[Tensor]
    ) -> list[Tensor | None]:
        losses, route, nodes = self.forward.losses, self.route, self.forward.graph.nodes
        # With further tensors below, the backward may run and free the last targets
        further = bool(extra) or self.to_grad
        early = [nodes[at] for at in route.last] if further and not retain_graph else ()
        with in_words(self._readers):
            # A local: an attribute would close a cycle, which keeps the graph until gc runs
            reader = Reader([nodes[at] for at in route.targets], self._read, early)
        arrive = partial(self._arrive, reader)
        # A node's prehook sees the gradient after users' hooks, as the backward uses it; an edge
        # sees it before them. So edges serve only the nodes where the backward ends.
        arrived: dict[Node, Sequence[Tensor | None]] = {}  # gradients that wait for the end
        handles: list[Any] = []
        for at in route.targets:
            ends, node = at in route.last, nodes[at]
            if ends and not further:
                continue
            small = at in route.small and node not in reader.later
            if (ends and not self.to_grad) or small or self.create_graph:
                handles.append(node.register_prehook(partial(arrived.__setitem__, node)))
            else:
                handles.append(node.register_prehook(continued(partial(arrive, node))))
        if self.create_graph and not tracing():
            for node in (nodes[at] for at in route.derived):
                handles += self._derivative(node).register()
        edges = [GradientEdge(nodes[at], nr) for at in route.last for nr in route.outputs[at]]
        if weight is None:
            weight = torch.ones_like(losses)
        extra_grads: list[Tensor | None] = []
        with in_words(), without_autocast(losses):
            try:
                if self.to_grad:
                    torch.autograd.backward(losses, weight, retain_graph=retain_graph)
                else:
                    grads = torch.autograd.grad(
                        losses,
                        [*edges, *extra],  # type: ignore[arg-type]
                        weight,
                        create_graph=self.create_graph,
                        retain_graph=retain_graph,
                        allow_unused=True,
                    )
            finally:  # before the backwards of `_finish`, which may run the same nodes
                for handle in handles:
                    handle.remove()
            if not self.to_grad:
                extra_grads += grads[len(edges) :]
                ended = route.rows(grads)
                arrived = {nodes[at]: row for at, row in ended.items()} | arrived
                del grads, ended
            with torch.set_grad_enabled(self.create_graph):
                for at in route.targets:  # frees each one after its use
                    if (node := nodes[at]) in arrived:
                        arrive(node, arrived.pop(node))
                self._finish()
        return extra_grads

    def _derivative(self, node: Node) -> OwnDerivative:
        if (own := OWN.get(node.name())) is not None:
            return own(node)
        rules = [use.rule for _, use in self.uses.get(node, ())]
        return NormBackward(node, rules, self.made.setdefault(node, {}))

    def _arrive(self, reader: Reader, node: Node, grads: Sequence[Tensor | None]) -> None:
        if reader.later:
            reader.come_to(node)
        if node in self.factors:
            self._arrive_at_boundary(node, grads)
        if node not in self.saved:
            return
        delta = grads[0]
        if delta is not None and self.factor is not None:
            delta = delta * self.factor
        made = self.made.pop(node, {})
        for (i, use), saved in zip(self.uses[node], self.saved.pop(node), strict=True):
            self.waiting[i] -= 1
            found = self.sums.pop(i, None)
            if delta is not None:
                own = use.rule.factor_beside(node, saved, delta, made)
                found = own if found is None else found.plus(own)
            if found is None:
                continue
            if self.waiting[i]:
                self.sums[i] = found
            else:
                self.consume(self.forward.names[i], found)

    def _arrive_at_boundary(self, node: Node, grads: Sequence[Tensor | None]) -> None:
        boundary = self.boundary_of[node]
        saved = self.saved_at.pop(node)
        made: dict[str, Any] = {}
        for slot, rule, given in zip(boundary.slots, boundary.rules, saved, strict=True):
            if rule is not None and given is not None and grads[0] is not None:
                found = rule.factor_beside(node, given, grads[0], made)
                self.factors[node][slot] = found.computed()
        if any(rule is None for rule in boundary.rules):
            self.at_boundary[node] = list(grads)

    def _finish(self) -> None:
        for i, found in self.sums.items():  # some uses had no gradient
            self.consume(self.forward.names[i], found)
        forward, indices = self.forward, self.forward.plan.by_autograd
        if not indices:
            return
        backward = BoundaryBackward(
            [
                BoundaryGradients(
                    node, boundary, self.at_boundary.get(node, ()), self.factors[node]
                )
                for node, boundary in self.boundaries
            ],
            [forward.parameters[i] for i in indices],
            forward.losses.shape[0],
        )
        cache: dict[Any, Any] = {}
        for k, i in enumerate(indices):
            self.consume(forward.names[i], ByAutograd(backward, k, None, cache))
