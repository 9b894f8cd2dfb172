"""Planner: finds where each parameter of a graph meets samples, and its rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .graph import Graph, holds_samples, moves_nothing, output_dtypes, output_shapes
from .ownership.owners import UNREAD, Output, Owner, OwnerMap, Unclear, completed, same
from .ownership.provenance import follows, probe
from .ownership.structure import structure
from .plan import COPIES, MOVES, Boundary, Plan, RuleUse
from .rules.registry import BoundRule, Use, rule_for

Boundaries = dict[int, list[tuple[Node, int, bool]]]  # parameter -> (node, slot, direct)


def _nodes(boundaries: Boundaries) -> dict[Node, None]:
    return dict.fromkeys(node for of_one in boundaries.values() for node, _, _ in of_one)


class Planner:
    """Finds the boundaries of parameters.

    A boundary of a parameter is the first operation on a path to the losses whose output gradient
    belongs to samples entry by entry. The operations below are shared by the samples or mix them,
    and are linear in the gradients at their boundaries.

    Args:
        losses: ``[N]``.
        graph: graph below the losses.
        parameters: parameters to plan for.
        past_zero: also search above operations whose output gradient is zero, everywhere or in rows
            that no pattern fills. Zero is right for every sample, but its derivative is not.
    """

    def __init__(
        self,
        losses: Tensor,
        graph: Graph,
        parameters: Sequence[Tensor],
        *,
        past_zero: bool = False,
    ) -> None:
        self.losses, self.graph, self.parameters = losses, graph, parameters
        self.past_zero = past_zero
        self.unread = False  # whether unreadable rows moved a boundary up
        self.owners: OwnerMap = {}
        root = losses.grad_fn
        assert root is not None
        self.root = root
        own = Owner(torch.arange(losses.shape[0], device=losses.device))
        self.owners[Output(root, losses.output_nr)] = own

    def boundaries(self) -> Boundaries:
        """Find the boundaries, probing as far as needed: position of a parameter -> ``(node, slot,
        direct)``; direct: only moves and casts are between."""
        leaves = {
            i: leaf
            for i, p in enumerate(self.parameters)
            if (leaf := self.graph.leaves.get(id(p))) is not None
        }
        first = dict.fromkeys(node for leaf in leaves.values() for node, _ in self._readers(leaf))
        beyond = {reader: None for node in first for reader, _ in self._beyond(node)}
        self._probe(first | beyond)
        stay = [node for node in first | beyond if not self._clean(node)]
        if mixed := [node for node in stay if node.name() not in COPIES]:
            self._probe(self.graph.above(mixed))
        return {i: self._apart([leaf])[0] for i, leaf in leaves.items()}

    def _apart(self, leaves: Sequence[Node]) -> list[list[tuple[Node, int, bool]]]:
        """Find boundaries of tensors with a common backward, none below another: a backward from
        the upper one would also pass the lower one."""
        through: set[Node] = set()
        while True:
            passed: set[Node] = set()
            found = [self._boundaries(leaf, through, passed) for leaf in leaves]
            nested = self._below(passed, {node for of_one in found for node, _, _ in of_one})
            if not nested:
                return found
            through |= nested
            self._probe(self.graph.above(nested))

    def _below(self, passed: set[Node], boundaries: set[Node]) -> set[Node]:
        """Return the boundaries that are below an operation in ``passed``, at any distance."""
        if len(boundaries) < 2 or passed.isdisjoint(self.graph.above(boundaries)):
            return set()
        return {node for node in boundaries if not passed.isdisjoint(self.graph.above([node]))}

    def plan(self) -> Plan:
        """Find the boundaries, and ask the rules."""
        made = Plan()
        boundaries = self.boundaries()
        made.dynamic = not self._by_structure(_nodes(boundaries))
        made.by_autograd = [
            i
            for i, of_one in boundaries.items()
            if any(self._rule_use(i, node, slot, direct) is None for node, slot, direct in of_one)
        ]
        together = self._apart([self._leaf(i) for i in made.by_autograd])
        if together != [boundaries[i] for i in made.by_autograd]:
            boundaries |= zip(made.by_autograd, together, strict=True)
            made.dynamic = not self._by_structure(_nodes(boundaries))
        uses = _nodes(boundaries)
        at_uses = [value for out, value in self.owners.items() if out.node in uses]
        made.dynamic |= self.unread  # the next graph may be readable
        made.zero = Unclear(mixes=False) in at_uses or (
            made.dynamic and any(self._lost(value, zero=True) for value in at_uses)
        )
        unknown = any(isinstance(v, Owner) and bool((v.ids < 0).any()) for v in at_uses)
        made.silent = made.zero or self.unread or (made.dynamic and unknown)
        for node in uses:
            for nr in range(len(output_shapes(node))):
                if isinstance(owner := self.owners.get(Output(node, nr)), Owner):
                    made.owners[self.graph.position[node], nr] = owner.ids
        slots_of: dict[Node, set[int]] = {}
        for i, of_one in boundaries.items():
            if i in made.by_autograd:
                for node, slot, _ in of_one:
                    slots_of.setdefault(node, set()).add(slot)
                continue
            rule_uses = [self._rule_use(i, node, slot, direct) for node, slot, direct in of_one]
            made.rule_uses[i] = [use for use in rule_uses if use is not None]
        for node, slots in slots_of.items():
            owners = tuple(self._owner(node, nr) for nr in range(len(output_shapes(node))))
            mixed = any(self._mixes(*node.next_functions[slot]) for slot in slots)
            where = self.graph.position[node]
            ruled = tuple(self._rule_for(node, slot, (), None) for slot in sorted(slots))
            made.boundaries.append(
                Boundary(where, tuple(sorted(slots)), ruled, owners, node.name(), mixed)
            )
        return made

    def holds_for_other_values(self, boundaries: Boundaries) -> bool:
        """Whether these boundaries hold for other values. A gradient that is zero, or of one sample
        alone, can hide mixed samples."""
        uses = _nodes(boundaries)
        if self._by_structure(uses):
            return True
        at_uses = [value for out, value in self.owners.items() if out.node in uses]
        return all(
            value is None
            or (
                isinstance(value, Owner)
                and bool((value.ids >= 0).all())
                and bool((value.ids != value.ids.min()).any())
            )
            for value in at_uses
        )

    def _by_structure(self, uses: Iterable[Node]) -> bool:
        """Whether the operations alone give the samples of all rows at these uses, without
        contradiction to the probes. These owners then replace the probed owners, which are unknown
        for rows without gradient."""
        uses = list(uses)
        owners = structure(self.losses, self.graph, uses)
        if owners is None:
            return False
        sure: OwnerMap = {}
        for node in uses:
            for nr in range(len(output_shapes(node))):
                out = Output(node, nr)
                seen = self.owners.get(out)
                if out not in owners:
                    if seen is not None and seen != Unclear(mixes=False):
                        return False
                    continue
                ids = owners[out]
                if ids is None or seen == Unclear(mixes=True):
                    return False
                ids = ids.to(self.losses.device)
                if isinstance(seen, Owner) and not self._agree(out, seen.ids, ids):
                    return False
                sure[out] = Owner(ids)
        self.owners.update(sure)
        return True

    def contradicts(self, plan: Plan) -> str | None:
        """After `plan`: return the name of an operation whose rows belong to other samples than in
        an earlier plan of this signature, or None."""
        for (where, nr), ids in plan.owners.items():
            node = self.graph.nodes[where]
            seen = self.owners.get(Output(node, nr))
            if isinstance(seen, Owner) and not self._agree(Output(node, nr), seen.ids, ids):
                return node.name()
        return None

    def _agree(self, out: Output, seen: Tensor, ids: Tensor) -> bool:
        """Whether the probed owners fit these owners. A probe may see whole rows or columns with a
        single nonzero entry; then the entries decide."""
        return same(seen, ids) or follows(self.losses, out, ids)

    def _mixes(self, node: Node | None, nr: int) -> bool:
        """Whether samples are mixed below a tensor, not only shared by samples."""
        if node is None or self.owners.get(Output(node, nr)) != Unclear(mixes=True):
            return False
        return holds_samples(node, self.losses.shape[0])

    def _readers(self, node: Node) -> Iterator[tuple[Node, int]]:
        """Yield the operations that read a tensor, directly or through moves and casts."""
        for consumer, slot, _ in self.graph.consumers[node]:
            if consumer.name() in MOVES and consumer is not self.root:
                yield from self._readers(consumer)
            else:
                yield consumer, slot

    def _beyond(self, node: Node) -> Iterator[tuple[Node, int]]:
        """Yield the operations that read a tensor through copies, which may be one per sample."""
        if node.name() in COPIES and node is not self.root:
            for reader, slot in self._readers(node):
                yield reader, slot
                yield from self._beyond(reader)

    def _probe(self, nodes: Iterable[Node]) -> None:
        outputs = [
            output
            for node in nodes
            for nr, shape in enumerate(output_shapes(node))
            if shape is not None and (output := Output(node, nr)) not in self.owners
        ]
        if outputs:
            found = probe(self.losses, self.graph, outputs)
            self.owners.update(found | self._by_structure_if_lost(found))

    def _lost(self, value: Owner | Unclear | None, zero: bool) -> bool:
        """Whether the sample of some rows stays unknown; with ``zero``, rows of zeros count too."""
        if not isinstance(value, Owner) or not bool((value.ids < 0).any()):
            return False
        ids = completed(value.ids, len(self.losses))
        return bool((ids < 0).any() if zero else (ids == UNREAD).any())

    def _by_structure_if_lost(self, found: OwnerMap) -> OwnerMap:
        """Find owners by structure for gradients with rows that no probe reads and no pattern
        fills; without them the boundary moves up."""
        lost = {out: value for out, value in found.items() if self._lost(value, self.past_zero)}
        owners = structure(self.losses, self.graph, {out.node for out in lost}) if lost else None
        made: OwnerMap = {}
        for out, value in lost.items():
            assert isinstance(value, Owner)
            unread = bool((value.ids == UNREAD).any())
            made[out] = Unclear(mixes=unread)
            if owners is not None and (ids := owners.get(out)) is not None:
                ids = ids.to(self.losses.device)
                if self._agree(out, value.ids, ids):
                    made[out], unread = Owner(ids), False
            self.unread |= unread
        return made

    def _clean(self, node: Node) -> bool:
        """Whether no entry of a gradient at its outputs mixes samples."""
        unclear = (Unclear(mixes=True), Unclear(mixes=False))[: 1 + self.past_zero]
        return not any(
            self.owners.get(Output(node, nr)) in unclear
            for nr, shape in enumerate(output_shapes(node))
            if shape is not None
        )

    def _owner(self, node: Node, nr: int) -> Tensor | None:
        value = self.owners.get(Output(node, nr))
        if not isinstance(value, Owner):
            return None
        return completed(value.ids, len(self.losses))

    def _boundaries(
        self, leaf: Node, through: set[Node], passed: set[Node]
    ) -> list[tuple[Node, int, bool]]:
        """Return ``(node, slot, direct)`` of each boundary; direct: only moves and casts are
        between. Nodes of ``through`` are no boundaries; nodes below one are added to ``passed``."""
        found: dict[tuple[Node, int], bool] = {}
        seen: set[Node] = set()
        pending = [(node, slot, True) for node, slot in self._readers(leaf)]
        while pending:
            node, slot, direct = pending.pop()
            if node is self.root or (self._clean(node) and node not in through):
                found[node, slot] = found.get((node, slot), True) and direct
            elif node not in seen:
                seen.add(node)
                if direct and node.name() in COPIES:
                    pending += [(reader, s, True) for reader, s in self._readers(node)]
                    continue
                passed.add(node)
                readers = self.graph.consumers[node]
                pending += [(consumer, s, False) for consumer, s, _ in readers]
        return [(node, slot, direct) for (node, slot), direct in found.items()]

    def _leaf(self, i: int) -> Node:
        return self.graph.leaves[id(self.parameters[i])]

    def _rule_use(self, i: int, node: Node, slot: int, direct: bool) -> RuleUse | None:
        """Ask the rules for the use of parameter ``i`` itself."""
        leaf = self._leaf(i)
        chain: list[str] = []
        below, _ = node.next_functions[slot]
        while below is not leaf:
            moves = direct and below is not None and below.name() in MOVES | COPIES
            if below is None or not moves or len(output_shapes(below)) > 1:
                return None
            chain.append("AliasBackward0" if moves_nothing(below) else below.name())
            below, _ = below.next_functions[0]
        rule = self._rule_for(node, slot, tuple(chain), tuple(self.parameters[i].shape))
        return None if rule is None else RuleUse(self.graph.position[node], rule, node.name())

    def _rule_for(
        self, node: Node, slot: int, chain: tuple[str, ...], parameter: tuple[int, ...] | None
    ) -> BoundRule | None:
        """Ask the rules for the tensor at a slot, or for a parameter of this shape behind it."""
        shapes, owner = output_shapes(node), self._owner(node, 0)
        output = shapes[0]
        below, nr = node.next_functions[slot]
        # A rule gets the gradient at output 0 only, so no other output may have one
        others = any(self.owners.get(Output(node, k)) is not None for k in range(1, len(shapes)))
        if others or owner is None or output is None or below is None:
            return None
        dtype = output_dtypes(node)[0]
        if dtype is not None and dtype.is_complex:  # conjugates, and real parts of real operands
            return None
        variable = getattr(below, "variable", None)
        shape = tuple(variable.shape) if variable is not None else output_shapes(below)[nr]
        if shape is None:
            return None
        return rule_for(
            Use(
                node=node,
                slot=slot,
                chain=chain,
                shape=shape,
                owner=owner,
                output=output,
                samples=self.losses.shape[0],
                parameter=shape if parameter is None else parameter,
            )
        )
