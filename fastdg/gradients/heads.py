"""The head: the parameters of the last layer before the losses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .._torch import sequence_number
from .engine import Forward
from .graph import Graph, output_dtypes, output_shapes, signed
from .ownership.layout import Layout, lead
from .plan import MOVES
from .planner import Planner

_ELEMENTWISE = ("AddBackward0", "MulBackward0", "SubBackward0", "DivBackward0")
_KEPT = 64
_heads: OrderedDict[Hashable, list[int]] = OrderedDict()


def head_of(losses: Tensor, graph: Graph, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the parameters of the last layer.

    The last layer is the last operation where a parameter meets samples, together with operations
    with parameters that feed it directly: a matrix product below a bias. A parameter that scales or
    shifts the losses ``[N]`` (weights of several losses) belongs to the criterion, not to a layer;
    so does a scalar (a temperature) that scales the layer's result but belongs to another module by
    its name.

    Args:
        losses: ``[N]``.
        graph: graph of ``losses.grad_fn``.
        named: name -> parameter of the optimizer, for all in the graph.
    """
    names, parameters = list(named), list(named.values())
    key = (tuple(names), losses.shape, graph.signature(parameters))
    if (known := _heads.get(key)) is not None:
        return {names[i]: parameters[i] for i in known}
    planner = Planner(losses, graph, parameters)
    met = planner.boundaries()
    users: dict[Node, set[int]] = {}
    for i, boundaries in met.items():
        for node, _, _ in boundaries:
            users.setdefault(node, set()).add(i)
    layers = [node for node in users if not _of_losses(node)]
    layers = layers or list(users)
    chosen: set[int] = set()
    pending = [max(layers, key=sequence_number)] if layers else []
    while pending:
        node = pending.pop()
        chosen |= users[node]
        if node.name() in _ELEMENTWISE:
            below = [_through_moves(child) for child, _ in node.next_functions if child is not None]
            pending += [child for child in below if child in users and not users[child] <= chosen]
    numbers = {i for i in chosen if parameters[i].numel() == 1}
    modules = {_module(names[i]) for i in chosen - numbers}
    own = {i for i in numbers if not modules or _module(names[i]) in modules}
    head = sorted((chosen - numbers) | own)
    if planner.holds_for_other_values(met):
        _heads[key] = head
        while len(_heads) > _KEPT:
            _heads.popitem(last=False)
    return {names[i]: parameters[i] for i in head}


def _of_losses(node: Node) -> bool:
    """Whether the operation scales or shifts the losses, not the result of a layer."""
    shape = output_shapes(node)[0]
    return node.name() in _ELEMENTWISE and shape is not None and len(shape) < 2


def _module(name: str) -> str:
    """Return the module name of a parameter; "" for all if names are unknown."""
    return "" if name.startswith("param_groups[") else name.rpartition(".")[0]


def known_head(
    forward: Forward, used: Mapping[str, Tensor], before: Sequence[str]
) -> Mapping[str, Tensor]:
    """Return ``used``, the head in ``forward``; where a compiled part has the head and other
    layers, the parameters ``before``, the head of an earlier forward.

    The first forwards of a scripted class are not compiled.

    Raises:
        RuntimeError: no earlier forward has shown the head.
    """
    names, advice = forward.names, None
    layers = {name.rpartition(".")[0] for name in names}
    if len(names) > 2 or len(layers) > 1:
        for node in forward.operations():
            if node.name() == "CompiledFunctionBackward":
                advice = (
                    "exclude the head from torch.compile, or compile the whole step with "
                    "fastdg.compiled"
                )
            elif "DifferentiableGraph" in node.name():
                advice = (
                    "or run the scripted model under torch.jit.optimized_execution(False) from its "
                    "first call on"
                )
    if advice is None:
        return used
    if before and all(name in used for name in before):
        return {name: used[name] for name in before}
    raise RuntimeError(
        "params: 'head' is unknown, since the model's last part is compiled as one operation with "
        f"{len(names)} parameters. Pass the head's names, params=['fc.weight', 'fc.bias'], "
        f"{advice}."
    )


def layers_after(forward: Forward, known: set[int]) -> Tensor | None:
    """Return a trained parameter outside ``known`` of a layer that ran after the head, or None."""
    graph = forward.graph
    head = max(map(sequence_number, forward.operations()), default=0)
    for key, leaf in graph.leaves.items():
        own = leaf.variable  # type: ignore[attr-defined]
        if key in known or not own.requires_grad or own.numel() == 1:  # such as a temperature
            continue
        readers = [consumer for consumer, _, _ in graph.consumers[leaf]]
        for reader in readers:  # grows while we walk it
            if reader.name() in MOVES:
                readers += [consumer for consumer, _, _ in graph.consumers[reader]]
            elif sequence_number(reader) > head and not _of_losses(reader):
                return own
    return None


def _through_moves(node: Node) -> Node:
    while node.name() in MOVES:
        child, _ = node.next_functions[0]
        if child is None:
            break
        node = child
    return node


def value_of(node: Node | None, nr: int = 0) -> Tensor | None:
    """Recompute the result of an operation from its saved tensors, with its graph; None for an
    unsupported operation."""
    if node is None:
        return None
    if (variable := getattr(node, "variable", None)) is not None:
        return variable
    made = _VALUES.get(node.name())
    if made is None:
        return None
    try:
        value = made(node)
    except _Unknown:
        return None
    shape, dtype = output_shapes(node)[nr], output_dtypes(node)[nr]
    return value if shape is None else value.to(dtype).expand(shape)


class _Unknown(Exception):
    """An operand is not known."""


def _operand(node: Node, slot: int, saved: str | None = None) -> Tensor:
    value = getattr(node, saved) if saved is not None else None
    if value is None:
        value = value_of(*node.next_functions[slot])
    if value is None:
        raise _Unknown
    return value


def _convolution(n: Any) -> Tensor:
    return torch.convolution(
        _operand(n, 0, "_saved_input"),
        _operand(n, 1, "_saved_weight"),
        None if n.next_functions[2][0] is None else _operand(n, 2),
        n._saved_stride,
        n._saved_padding,
        n._saved_dilation,
        n._saved_transposed,
        n._saved_output_padding,
        n._saved_groups,
    )


def _reshaped(n: Any) -> Tensor:
    shape = output_shapes(n)[0]
    assert shape is not None
    return _operand(n, 0).reshape(shape)


_VALUES: dict[str, Callable[[Any], Tensor]] = {
    "AddmmBackward0": lambda n: torch.addmm(
        _operand(n, 0),
        _operand(n, 1, "_saved_mat1"),
        _operand(n, 2, "_saved_mat2"),
        alpha=n._saved_alpha,
        beta=n._saved_beta,
    ),
    "MmBackward0": lambda n: _operand(n, 0, "_saved_self") @ _operand(n, 1, "_saved_mat2"),
    "BmmBackward0": lambda n: _operand(n, 0, "_saved_self") @ _operand(n, 1, "_saved_mat2"),
    "AddBackward0": lambda n: torch.add(_operand(n, 0), _operand(n, 1), alpha=n._saved_alpha),
    "MulBackward0": lambda n: _operand(n, 0, "_saved_self") * _operand(n, 1, "_saved_other"),
    "ConvolutionBackward0": _convolution,
    "TBackward0": lambda n: _operand(n, 0).t(),
    "TransposeBackward0": lambda n: _operand(n, 0).transpose(
        signed(n._saved_dim0), signed(n._saved_dim1)
    ),
    "ToCopyBackward0": lambda n: _operand(n, 0),
    "ExpandBackward0": lambda n: _operand(n, 0),
    "CloneBackward0": lambda n: _operand(n, 0),
    "AliasBackward0": lambda n: _operand(n, 0),
    **dict.fromkeys(
        ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0"),
        _reshaped,
    ),
}


@dataclass(frozen=True)
class Head:
    """Result of the last layer.

    Attributes:
        edge: edge of its gradient.
        value: the result, with its graph.
        layout: samples of its rows.
    """

    edge: GradientEdge
    value: Tensor
    layout: Layout

    def rows(self, x: Tensor) -> Tensor:
        """Reshape ``x``, of the shape of the result, to ``[N, *]``."""
        rows = self.layout.rows(x)
        return rows.squeeze(1) if rows.shape[1] == 1 else rows


def crossed_output(losses: Tensor) -> Head | None:
    """Return the input of a cross-entropy, from any layer; None for other losses.

    A cross-entropy has saved the log-softmax of the logits. Its products with the gradient at the
    logits are the same as the logits' products, since the entries of the gradient sum to zero.
    """
    node: Any = losses.grad_fn
    layout = Layout("major", len(losses), 1, None)
    if node.name() == "NllLossBackward0":
        node = node.next_functions[0][0]
        if node.name() != "LogSoftmaxBackward0" or signed(node._saved_dim) not in (1, -1):
            return None
        value = node._saved_result
    elif node.name() == "BinaryCrossEntropyWithLogitsBackward0":
        value = node._saved_self
    else:
        return None
    child, nr = node.next_functions[0]
    if child is None or value.shape[0] != len(losses):
        return None
    return Head(GradientEdge(child, nr), value, layout)


def last_output(forward: Forward) -> Head:
    """Return the result of the last layer with parameters, of a forward that tracks the head.

    Raises:
        RuntimeError: the last layer, or the samples of its rows, are unknown.
    """
    plan = forward.plan
    node = max(forward.operations(), key=sequence_number)
    several = any(len({use.node for use in uses}) > 1 for uses in plan.rule_uses.values())
    if several:
        raise RuntimeError(f"losses: the head ran several times, {_WHICH}")
    where = forward.graph.position[node]
    owner = next((b.owners[0] for b in plan.boundaries if b.node == where), None)
    found = [
        use.rule.layout for uses in plan.rule_uses.values() for use in uses if use.node == where
    ]
    value, shape = value_of(node), output_shapes(node)[0]
    samples = len(forward.losses)
    if not found and owner is None and plan.silent and shape and shape[0] % samples == 0:
        # Its gradient is zero or NaN: so are all products with it
        found = [Layout("major", samples, shape[0] // samples, None)]
    if not found and owner is not None and shape is not None:
        rows = lead(owner, shape, (0,))
        found = [] if rows is None else [Layout.of(rows, samples)]
    if not found or value is None or len(output_shapes(node)) != 1:
        raise RuntimeError(f"losses: the last layer is {node.name()}, {_WHICH}")
    return Head(GradientEdge(node, 0), value, found[0])


_WHICH = (
    "so fastdg cannot find the logits. Pass them: opt.backward(losses, domains, logits=logits)."
)
