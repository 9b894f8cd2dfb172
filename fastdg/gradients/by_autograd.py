"""Per-sample gradients without rules.

At a boundary, the operation's own backward runs on the output gradient, weighted sample by sample,
and gives gradients at the shared inputs. Autograd continues from these through the shared
part of the graph to the parameters. Each row of weights costs one call of the boundary operations
and one backward of the shared part, for all operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .. import ops
from ..domains import Partition
from ..dtypes import to_statistics_dtype
from ..factors import Dense, PerSampleGrad, flat
from .graph import Graph, output_dtypes
from .operation_backward import backward_of
from .plain import unhooked, without_autocast
from .plan import Boundary

BYTES = 1 << 26  # of the gradients of one backward


class BoundaryGradients(NamedTuple):
    """Gradients at one boundary.

    Attributes:
        node: the operation.
        boundary: its boundary.
        deltas: gradient of ``losses.sum()`` at each output, or None; needed if a slot has no
            factor.
        factors: slot -> per-sample gradients of its tensor, if made by a rule.
    """

    node: Node
    boundary: Boundary
    deltas: Sequence[Tensor | None]
    factors: Mapping[int, PerSampleGrad]


class BoundaryBackward:
    """Backward from boundaries to several parameters, through the shared part of the graph.

    Args:
        parts: gradients at all boundaries; the graph must not be freed.
        parameters: the tensors.
        samples: N.
    """

    def __init__(
        self, parts: Sequence[BoundaryGradients], parameters: Sequence[Tensor], samples: int
    ) -> None:
        self.parts, self.parameters, self.samples = parts, list(parameters), samples
        self.create_graph = torch.is_grad_enabled()
        entries = sum(p.numel() * p.element_size() for p in self.parameters)
        self.chunk = max(1, BYTES // max(entries, 1))

    def domain(self, partition: Partition, scale: Tensor | None) -> list[Tensor]:
        """Compute the mean gradient of each domain, ``[D, *shape]`` for each parameter.

        Args:
            partition: partition of the samples.
            scale: factor of each sample's gradient ``[N]``.
        """
        domains = torch.arange(partition.num_domains, device=partition.domains.device)
        member = partition.domains.unsqueeze(0) == domains.unsqueeze(1)
        means = member.double() / partition.count.clamp(min=1).unsqueeze(1)

        def mean(factor: PerSampleGrad) -> Tensor:  # only `moments` has a derivative
            return factor.moments(partition)[0] if self.create_graph else factor.domain(partition)

        return self._weighted_sums(means, scale, mean)

    def of_samples(self, number: slice, scale: Tensor | None) -> list[Tensor]:
        """Compute gradients of K samples, ``[K, *shape]`` per parameter."""
        device = self.parameters[0].device
        rows = torch.eye(self.samples, device=device, dtype=torch.float64)[number]
        return self._weighted_sums(rows, scale, lambda factor: factor.take(number).per_sample())

    def _weighted_sums(
        self, weights: Tensor, scale: Tensor | None, read: Callable[[PerSampleGrad], Tensor]
    ) -> list[Tensor]:
        """Compute ``sum_i weights[k, i] scale[i] g_i`` for ``weights [K, N]`` and each parameter;
        ``read`` computes the same sums of a scaled factor."""
        weighted = weights if scale is None else weights * scale.to(weights.dtype)
        edges: dict[tuple[Node | None, int], Tensor] = {}

        def arrive(node: Node, slot: int, rows: Tensor) -> None:
            edge = node.next_functions[slot]
            edges[edge] = edges[edge] + rows if edge in edges else rows

        with without_autocast(weights), unhooked(self.parameters):
            for node, boundary, deltas, factors in self.parts:
                for slot, factor in factors.items():
                    rows = read(factor if scale is None else factor.scaled(scale))
                    like = _dtype_at(node, slot)
                    arrive(node, slot, rows if like is None else rows.to(like))
                slots = [slot for slot in boundary.slots if slot not in factors]
                if not slots or all(delta is None for delta in deltas):
                    continue
                made: dict[int, list[Tensor]] = {}
                for row in weighted:
                    masked = [
                        None if delta is None else _weighted(delta, owner, row)
                        for delta, owner in zip(deltas, boundary.owners, strict=True)
                    ]
                    for slot, grad in backward_of(node, masked, slots):
                        made.setdefault(slot, []).append(grad)
                for slot, grads in made.items():
                    arrive(node, slot, torch.stack(grads))
            parts = [
                self._through({edge: rows[i : i + self.chunk] for edge, rows in edges.items()})
                for i in range(0, len(weights), self.chunk)
            ]
        if len(parts) > 1:
            return [torch.cat(of_one) for of_one in zip(*parts, strict=True)]
        return parts[0] if self.create_graph else _apart(parts[0])

    def _through(self, edges: Mapping[tuple[Node | None, int], Tensor]) -> list[Tensor]:
        """Run autograd from gradients at the edges to the parameters."""
        there = {edge: rows for edge, rows in edges.items() if rows.numel()}
        outputs = [GradientEdge(node, nr) for node, nr in there if node is not None]
        stacked, rows = list(there.values()), max(map(len, edges.values()), default=0)

        def grad(given: Sequence[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                outputs,
                self.parameters,
                list(given),
                retain_graph=True,
                create_graph=self.create_graph,
                allow_unused=True,
                is_grads_batched=batched,
            )

        if not outputs:
            return [p.new_zeros((rows, *p.shape)) for p in self.parameters]
        if rows == 1:
            found = [
                None if g is None else g.unsqueeze(0) for g in grad([s[0] for s in stacked], False)
            ]
        elif self.create_graph and _unbatched(edge.node for edge in outputs):
            found = _one_by_one(grad, stacked, rows)
        else:
            found = _batched(grad, stacked, rows)
        return [
            p.new_zeros((rows, *p.shape)) if g is None else (g.to_dense() if g.is_sparse else g)
            for p, g in zip(self.parameters, found, strict=True)
        ]


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors that share memory, so that each may be written to. Autograd gives both terms of
    a sum the same gradient, and the operand of a sum an expanded one."""
    seen: set[int] = set()
    found = []
    for x in tensors:
        storage = x.untyped_storage()._cdata
        repeats = any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True))
        found.append(x.clone() if repeats or storage in seen else x)
        seen.add(storage)
    return found


def _batched(
    grad: Callable[[Sequence[Tensor], bool], tuple[Tensor | None, ...]],
    stacked: Sequence[Tensor],
    rows: int,
) -> list[Tensor | None]:
    """Run all rows in one call; one by one if an operation has no batching rule."""
    try:
        return list(grad(stacked, True))
    except RuntimeError:
        return _one_by_one(grad, stacked, rows)


def _unbatched(nodes: Iterable[Node]) -> bool:
    """Whether some operation below has a backward that is wrong when batched and differentiated at
    once: it takes its saved statistics for batched ones, without an error if sizes fit."""
    return any(
        below.name() == "NativeGroupNormBackward0"
        for node in dict.fromkeys(nodes)
        for below in Graph(node).nodes
    )


def _one_by_one(
    grad: Callable[[Sequence[Tensor], bool], tuple[Tensor | None, ...]],
    stacked: Sequence[Tensor],
    rows: int,
) -> list[Tensor | None]:
    each = [grad([s[k] for s in stacked], False) for k in range(rows)]
    return [
        None
        if all(g is None for g in of_one)
        else torch.stack([g for g in of_one if g is not None])
        for of_one in zip(*each, strict=True)
    ]


def _dtype_at(node: Node, slot: int) -> torch.dtype | None:
    """Return the dtype of the tensor at an input of an operation."""
    child, nr = node.next_functions[slot]
    if child is None:
        return None
    variable = getattr(child, "variable", None)
    return variable.dtype if variable is not None else output_dtypes(child)[nr]


def _weighted(delta: Tensor, owner: Tensor | None, weights: Tensor) -> Tensor:
    if owner is None:  # zero everywhere
        return delta
    known, of_entry = owner >= 0, weights[owner.clamp(min=0)]
    weighted = delta * torch.where(known, of_entry, 0).to(delta.dtype)
    # A NaN of a sample with weight 0 must not reach the others
    return torch.where(known & (of_entry == 0), 0, weighted)


class ByAutograd(PerSampleGrad):
    """One parameter of a `BoundaryBackward`; results are computed for all parameters and cached.

    Args:
        backward: backward to all parameters.
        index: index of this parameter.
        scale: factor of each sample's gradient, ``[N]``.
    """

    def __init__(
        self, backward: BoundaryBackward, index: int, scale: Tensor | None, cache: dict[Any, Any]
    ) -> None:
        self.backward, self.index, self.scale, self.cache = backward, index, scale, cache
        self.shape, self.samples = tuple(backward.parameters[index].shape), backward.samples

    def _of_all(self, key: Any, compute: Callable[[], list[Any]], of: Any = None) -> Any:
        """Return this parameter's entry. ``of`` is the object whose id is in the key, kept so that
        no other object gets this id."""
        if key not in self.cache:
            self.cache[key] = of, compute()
        return self.cache[key][1][self.index]

    def domain(self, partition: Partition) -> Tensor:
        def compute() -> list[Tensor]:
            return [to_statistics_dtype(g) for g in self.backward.domain(partition, self.scale)]

        return self._of_all(("domain", id(partition)), compute, partition)

    def moments(self, partition: Partition) -> tuple[Tensor, Tensor]:
        def compute() -> list[tuple[Tensor, Tensor]]:
            means = [to_statistics_dtype(g) for g in self.backward.domain(partition, self.scale)]
            spread = [torch.zeros_like(mean) for mean in means]
            for rows, number in self._samples():
                part = partition.take(number)
                share = (part.count / partition.count.clamp(min=1)).unsqueeze(1)
                for k, grads in enumerate(rows):
                    mean, own = ops.moments(flat(grads), part.order, part.offsets)
                    own = own + (mean - flat(means[k])).square()
                    spread[k] = spread[k] + (share.to(own.dtype) * own).view(means[k].shape)
            return list(zip(means, spread, strict=True))

        return self._of_all(("moments", id(partition)), compute, partition)

    def norms(self) -> Tensor:
        def compute() -> list[Tensor]:
            parts = [
                [flat(to_statistics_dtype(g)).square().sum(1) for g in rows]
                for rows, _ in self._samples()
            ]
            return [torch.cat(of_one) for of_one in zip(*parts, strict=True)]

        return self._of_all("norms", compute)

    def per_sample(self) -> Tensor:
        def compute() -> list[Tensor]:
            parts = [rows for rows, _ in self._samples()]
            return [to_statistics_dtype(torch.cat(of_one)) for of_one in zip(*parts, strict=True)]

        return self._of_all("samples", compute)

    def _samples(self) -> Any:
        """Yield chunks: the gradients of some samples, and the samples' numbers."""
        for first in range(0, self.samples, self.backward.chunk):
            number = slice(first, min(self.samples, first + self.backward.chunk))
            yield self.backward.of_samples(number, self.scale), number

    def scaled(self, weights: Tensor) -> PerSampleGrad:
        scale = weights if self.scale is None else self.scale * weights
        _, cache = self.cache.setdefault(("scaled", id(weights)), (weights, {}))
        return ByAutograd(self.backward, self.index, scale, cache)

    def take(self, number: slice) -> PerSampleGrad:
        return Dense(self.per_sample()[number])

    def fold(self, samples: int) -> PerSampleGrad:
        return Dense(self.per_sample()).fold(samples)
