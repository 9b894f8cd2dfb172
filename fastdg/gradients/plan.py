"""How each parameter of a graph is served: boundaries, rules, and what no rule knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .graph import Graph, holds_samples, output_shapes
from .provenance import Found, Output, Owner, Unclear, probe
from .rules import Served, Use, serve
from .static import structural, watched

# One input, one output (or several parts of it), and nothing but entries moved or cast
MOVES = frozenset(
    f"{name}Backward{number}"
    for name in (
        *(
            "T",
            "View",
            "UnsafeView",
            "ReshapeAlias",
            "Transpose",
            "Permute",
            "Unsqueeze",
            "Squeeze",
        ),
        *("ToCopy", "Alias", "Clone", "Slice", "Select", "Split", "SplitWithSizes"),
        *("Unbind", "Diagonal", "AsStrided", "Movedim", "Swapaxes", "Narrow"),
    )
    for number in range(4)
)

# They may repeat a tensor for each sample, or a weight for each product of a batch
COPIES = frozenset({"ExpandBackward0", "RepeatBackward0"})


@dataclass(frozen=True)
class Place:
    """One use of a parameter that a rule serves."""

    node: int
    served: Served
    operation: str


@dataclass(frozen=True)
class Boundary:
    """Where a tensor that no rule knows meets samples.

    Attributes:
        node: position of the operation in the graph.
        slots: the inputs that the parameters reach.
        served: the rule that makes the per-sample gradients of the tensor at each slot, if any.
        owners: sample of each entry of the gradient at each output; None without a gradient.
        operation: its name.
        mixed: whether the samples were found mixed below it.
    """

    node: int
    slots: tuple[int, ...]
    served: tuple[Served | None, ...]
    owners: tuple[Tensor | None, ...]
    operation: str
    mixed: bool


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two maps agree where both know the sample."""
    if a is None or b is None or a.shape != b.shape:
        return a is b or a is None or b is None
    return bool(((a == b) | (a < 0) | (b < 0)).all())


@dataclass
class Plan:
    """How the parameters of all graphs of one signature are served.

    Attributes:
        places: position of a parameter -> its uses, where a rule knows all of them.
        pulled: positions of the other parameters that the graph reaches.
        boundaries: of these, all together.
        silent: whether a gradient that was zero left something unknown.
        zero: whether it was zero everywhere at a use: its own gradients may not be zero.
        dynamic: whether values choose or mix rows above a use, so that the next graph of the same
            signature may be another.
    """

    places: dict[int, list[Place]] = field(default_factory=dict)
    pulled: list[int] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)
    silent: bool = False
    zero: bool = False
    dynamic: bool = False

    @property
    def slow(self) -> list[Boundary]:
        """The boundaries whose operation is called once for each domain or sample, or below which
        the samples are mixed."""
        return [b for b in self.boundaries if b.mixed or None in b.served]

    def differs(self, other: Plan) -> str | None:
        """The operation at which two plans of one signature part, None if they agree."""
        if self.places.keys() != other.places.keys() or self.pulled != other.pulled:
            return "a parameter"
        for i, places in self.places.items():
            for one, two in zip(places, other.places[i], strict=True):
                if one.node != two.node or not one.served.agrees(two.served):
                    return one.operation
        for mine, theirs in zip(self.boundaries, other.boundaries, strict=True):
            if not all(map(_same, mine.owners, theirs.owners)):
                return mine.operation
        return None


class Planner:
    """Finds the boundaries of parameters.

    A boundary of a parameter is the first operation on a way from it to the losses whose output
    gradient belongs to samples entry by entry. What lies below is shared by the samples, or mixes
    them: it is linear in the gradients that arrive at its boundaries.

    Args:
        losses: ``[N]``.
        graph: below them.
        parameters: those to serve.
        past_zero: look for boundaries above operations whose output gradient is zero everywhere,
            too. Zero is right for every sample, but its derivative is not.
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
        self.found: Found = {}
        root = losses.grad_fn
        assert root is not None
        self.root = root
        own = Owner(torch.arange(losses.shape[0], device=losses.device), known=True)
        self.found[Output(root, losses.output_nr)] = own

    def boundaries(self) -> dict[int, list[tuple[Node, int, bool]]]:
        """Position of a parameter -> ``(node, slot, direct)`` of its boundaries; direct: nothing
        but moves and casts lies between. Probes as far as needed."""
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
        return {i: self._boundaries(leaf) for i, leaf in leaves.items()}

    def plan(self) -> Plan:
        """Find the boundaries, and ask the rules."""
        made = Plan()
        together: dict[Node, set[int]] = {}
        for i, found in self.boundaries().items():
            places = [self._place(i, node, slot, direct) for node, slot, direct in found]
            served = [place for place in places if place is not None]
            if len(served) == len(places):
                made.places[i] = served
                continue
            made.pulled.append(i)
            for node, slot, _ in found:
                together.setdefault(node, set()).add(slot)
        for node, slots in together.items():
            owners = tuple(self._owner(node, nr) for nr in range(len(output_shapes(node))))
            mixed = any(self._mixes(*node.next_functions[slot]) for slot in slots)
            where = self.graph.position[node]
            ruled = tuple(self._serve(node, slot, (), None) for slot in sorted(slots))
            made.boundaries.append(
                Boundary(where, tuple(sorted(slots)), ruled, owners, node.name(), mixed)
            )
        uses = [self.graph.nodes[p.node] for of_one in made.places.values() for p in of_one]
        uses = list(dict.fromkeys([*uses, *together]))
        at_uses = [value for out, value in self.found.items() if out.node in uses]
        made.zero = Unclear(mixes=False) in at_uses
        made.silent = made.zero or any(isinstance(v, Owner) and not v.known for v in at_uses)
        outputs = watched(self.graph, uses)
        if outputs is not None:
            self._probe(dict.fromkeys(out.node for out in outputs))
        made.dynamic = outputs is None or not structural(self.graph, uses, outputs, self.found)
        return made

    def _mixes(self, node: Node | None, nr: int) -> bool:
        """Whether the samples meet below a tensor; they only share it if it was made without."""
        if node is None or self.found.get(Output(node, nr)) != Unclear(mixes=True):
            return False
        return holds_samples(node, self.losses.shape[0])

    def _readers(self, node: Node) -> Iterator[tuple[Node, int]]:
        """Operations that read a tensor, through such as only move or cast its entries."""
        for consumer, slot, _ in self.graph.consumers[node]:
            if consumer.name() in MOVES and consumer is not self.root:
                yield from self._readers(consumer)
            else:
                yield consumer, slot

    def _beyond(self, node: Node) -> Iterator[tuple[Node, int]]:
        """What reads a tensor through an operation that repeats it, perhaps for each sample."""
        if node.name() in COPIES and node is not self.root:
            for reader, slot in self._readers(node):
                yield reader, slot
                yield from self._beyond(reader)

    def _probe(self, nodes: Iterable[Node]) -> None:
        outputs = [
            output
            for node in nodes
            for nr, shape in enumerate(output_shapes(node))
            if shape is not None and (output := Output(node, nr)) not in self.found
        ]
        if outputs:
            self.found.update(probe(self.losses, self.graph, outputs))

    def _clean(self, node: Node) -> bool:
        """Whether no entry of a gradient at its outputs mixes samples."""
        unclear = (Unclear(mixes=True), Unclear(mixes=False))[: 1 + self.past_zero]
        return not any(
            self.found.get(Output(node, nr)) in unclear
            for nr, shape in enumerate(output_shapes(node))
            if shape is not None
        )

    def _owner(self, node: Node, nr: int) -> Tensor | None:
        value = self.found.get(Output(node, nr))
        return value.ids if isinstance(value, Owner) else None

    def _boundaries(self, leaf: Node) -> list[tuple[Node, int, bool]]:
        """``(node, slot, direct)`` of each boundary; direct: only moves and casts lie between."""
        found: dict[tuple[Node, int], bool] = {}
        seen: set[Node] = set()
        pending = [(node, slot, True) for node, slot in self._readers(leaf)]
        while pending:
            node, slot, direct = pending.pop()
            if node is self.root or self._clean(node):
                found[node, slot] = found.get((node, slot), True) and direct
            elif node not in seen:
                seen.add(node)
                if direct and node.name() in COPIES:
                    pending += [(reader, s, True) for reader, s in self._readers(node)]
                    continue
                readers = self.graph.consumers[node]
                pending += [(consumer, s, False) for consumer, s, _ in readers]
        return [(node, slot, direct) for (node, slot), direct in found.items()]

    def _place(self, i: int, node: Node, slot: int, direct: bool) -> Place | None:
        """How a rule serves the use of parameter ``i`` itself, if one does."""
        leaf = self.graph.leaves[id(self.parameters[i])]
        chain: list[str] = []
        below, _ = node.next_functions[slot]
        while below is not leaf:
            moves = direct and below is not None and below.name() in MOVES | COPIES
            if below is None or not moves or len(output_shapes(below)) > 1:
                return None
            chain.append(below.name())
            below, _ = below.next_functions[0]
        served = self._serve(node, slot, tuple(chain), tuple(self.parameters[i].shape))
        return None if served is None else Place(self.graph.position[node], served, node.name())

    def _serve(
        self, node: Node, slot: int, chain: tuple[str, ...], parameter: tuple[int, ...] | None
    ) -> Served | None:
        """Ask the rules for the tensor at a slot, or for a parameter of that shape behind it."""
        shapes, owner = output_shapes(node), self._owner(node, 0)
        output = shapes[0]
        below, nr = node.next_functions[slot]
        # A rule is given the gradient at output 0 alone, so no other one may have one
        others = any(self.found.get(Output(node, k)) is not None for k in range(1, len(shapes)))
        if others or owner is None or output is None or below is None:
            return None
        variable = getattr(below, "variable", None)
        shape = tuple(variable.shape) if variable is not None else output_shapes(below)[nr]
        if shape is None:
            return None
        return serve(
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
