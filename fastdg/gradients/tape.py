"""The tracked parameters of an optimizer or a model in the graph of some losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._torch import hooked, metadata_of
from ..domains import tracing
from ..dtypes import HALVES
from ..factors import PerSampleGrad
from ..selection import NAMES, Selection, select
from ..warn import warn_user
from .checkpoints import reentrant_checkpoints, tensors_inside
from .engine import Consume, Forward, collect, plan_gradients
from .errors import in_words, listed, not_a_tensor, reentrant
from .graph import Graph
from .heads import head_of, known_head, layers_after
from .scale import backward_scale, mean_scale, unscaled
from .second import refuse_single_derivatives


@dataclass
class TrackedForward:
    """The tracked parameters in the graph of some losses, and their plan.

    Attributes:
        chosen: name -> selected parameter in the graph.
        leaves: name -> tensor that the forward used as this parameter (FSDP2 has others).
        other_leaves: other tensors to which a backward would give a ``.grad``.
        forward: plan for the chosen parameters; None if only sums over samples are needed.
    """

    chosen: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    other_leaves: list[Tensor] = field(default_factory=list)
    forward: Forward | None = None

    @property
    def sparse(self) -> set[Tensor]:
        """The chosen parameters whose autograd gradient is sparse."""
        if self.forward is None:
            return set()
        names, nodes = self.forward.names, self.forward.graph.nodes
        return {
            self.chosen[names[i]]
            for i, at in self.forward.plan.lookups
            if getattr(nodes[at], "_saved_sparse", False)
        }

    @property
    def slow(self) -> bool:
        """Whether some chosen parameters need a call of autograd for each domain."""
        return self.forward is not None and bool(self.forward.plan.slow)

    @property
    def from_mean(self) -> bool:
        """Whether the backward of the mean loss has all per-sample gradients, and passes no halves,
        in which a gradient divided by the number of samples may underflow, and is rounded."""
        if self.forward is None or self.forward.plan.by_autograd:
            return False
        nodes = self.forward.graph.nodes
        for at in self.forward.route().passed:
            for output in metadata_of(nodes[at]):
                if output is not None and output.dtype in HALVES:
                    return False
        return True

    @property
    def hooked(self) -> bool:
        """Whether a tensor that gets a ``.grad`` has hooks, which only ``backward()`` calls."""
        return hooked((*self.leaves.values(), *self.other_leaves))

    def collect(
        self,
        consume: Consume,
        *,
        create_graph: bool = False,
        retain_graph: bool = False,
        extra: Sequence[Tensor] = (),
        scale: Tensor | None = None,
        to_grad: bool = False,
    ) -> list[Tensor | None]:
        """Run one backward and call ``consume`` with each chosen parameter's `PerSampleGrad`.

        Args:
            consume: called with a name and its `PerSampleGrad`, as soon as it is complete.
            create_graph: make the per-sample gradients differentiable.
            retain_graph: keep the graph.
            extra: tensors whose gradients of ``losses.sum()`` the same backward computes.
            scale: loss scale of a ``torch.amp.GradScaler`` for the backward; all results are
                unscaled.
            to_grad: run the training step's backward of ``losses.mean()`` in its place, which adds
                to ``.grad``, times ``scale``; only if `from_mean`.

        Returns:
            The gradients of ``extra``.
        """
        forward = self.forward
        assert forward is not None
        if create_graph:
            self.refuse_single_derivatives()
        losses, samples = forward.losses, forward.losses.shape[0]
        grad_scale = None if to_grad else backward_scale(losses, scale)
        weight, inverse, use = None, None, consume
        if to_grad:
            weight, inverse = mean_scale(losses, scale)
        elif grad_scale is not None:
            weight = torch.ones_like(losses) * grad_scale
            of_each = grad_scale.reciprocal().expand(samples)

            def use(name: str, factor: PerSampleGrad) -> None:
                consume(name, factor.scaled(of_each))

        grads = collect(
            forward,
            use,
            create_graph=create_graph,
            retain_graph=retain_graph,
            extra=extra,
            weight=weight,
            to_grad=inverse,
        )
        return [None if grad is None else unscaled(grad, grad_scale) for grad in grads]

    def refuse_single_derivatives(self) -> None:
        """Raise if an operation on the way of the gradients has no second derivative."""
        forward = self.forward
        assert forward is not None
        nodes, route, called = forward.graph.nodes, forward.route(), forward.called()
        above = [nodes[at] for at in route.passed if at not in route.last]
        refuse_single_derivatives(dict.fromkeys([*called, *above]), set(called))


class Tape:
    """Selection of parameters to track, for any forward; `record` and every wrapper create one.

    A tape does not watch forwards: the graph of the losses has all information.

    Args:
        names: parameter -> its name.
        params: selection of these parameters.
        leaf: parameter -> tensor that a forward uses in its place.
    """

    def __init__(
        self,
        names: Mapping[Tensor, str],
        params: Selection,
        leaf: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.names = {name: p for p, name in names.items()}
        self.params = params
        self.leaf = leaf or (lambda p: p)
        self._warned = self._head_seen = False
        self._head: list[str] = []  # names of the last head

    def resolve(self, losses: Tensor, *, warn: bool = True) -> TrackedForward:
        """Find the selected parameters below ``losses`` ``[N]``, and plan their gradients.

        Raises:
            TypeError, ValueError: ``losses`` are not as described.
            RuntimeError: the losses depend on none of the parameters.
        """
        graph, used = self._reach(losses)
        if isinstance(self.params, str) and self.params == "head":
            with in_words():
                used = head_of(losses, graph, used)
            self._refuse_hidden(graph, used, lambda name, p: name in used)
        elif self.params == "all":
            self._refuse_hidden(graph, used, lambda name, p: True)
        else:
            # A selection may have frozen parameters: these count once they are unfrozen.
            selected = select(self.params, self.names)
            wanted = {name: p for name, p in used.items() if selected(name, self.names[name])}
            self._refuse_hidden(graph, used, selected)
            if not wanted:
                raise RuntimeError(
                    "params: the losses depend on none of the selected parameters, only on "
                    f"{sorted(used)}. Select some of these."
                )
            used = wanted
        forward = plan_gradients(losses, used, graph)
        if self.params == "head":
            head = known_head(forward, used, self._head)
            if head is not used:
                used, forward = dict(head), plan_gradients(losses, head, graph)
            self._head = list(used)
            self._warn_of_later_layers(forward)
        tracked = self._tracked(graph, used, forward)
        if warn:
            self.warn(tracked)
        return tracked

    def reached(self, losses: Tensor) -> TrackedForward:
        """Find the parameters below ``losses``, for gradients summed over the samples."""
        graph, used = self._reach(losses)
        return self._tracked(graph, used, None)

    def _reach(self, losses: Tensor) -> tuple[Graph, dict[str, Tensor]]:
        check_losses(losses)
        assert losses.grad_fn is not None
        graph = Graph(losses.grad_fn)
        leaves = graph.leaves
        used = {
            name: leaf
            for name, p in self.names.items()
            if p.requires_grad and id(leaf := p if id(p) in leaves else self.leaf(p)) in leaves
        }
        if not used:
            self._refuse_hidden(graph, used, lambda name, p: True)
            raise RuntimeError(
                "losses: they depend on none of the tracked parameters. Compute them from the "
                "optimizer's model, outside torch.no_grad and torch.func, and without detach. For "
                "a stateless model use fastdg.func."
            )
        return graph, used

    def _refuse_hidden(
        self, graph: Graph, used: Mapping[str, Tensor], asked: Callable[[str, Tensor], bool]
    ) -> None:
        """Raise if a reentrant checkpoint may use a selected parameter."""
        checkpoints = reentrant_checkpoints(graph.nodes)
        if not checkpoints:
            return
        inside = {id(p) for checkpoint in checkpoints for p in tensors_inside(checkpoint)}
        hidden = [
            name
            for name, p in self.names.items()
            if p.requires_grad and asked(name, p)
            if name not in used or id(used[name]) in inside
        ]
        if hidden:
            raise reentrant(hidden)

    def _tracked(
        self, graph: Graph, used: dict[str, Tensor], forward: Forward | None
    ) -> TrackedForward:
        taken = {id(p) for p in used.values()}
        others = [
            leaf
            for key, node in graph.leaves.items()
            if key not in taken and (leaf := node.variable).requires_grad  # type: ignore[attr-defined]
        ]
        return TrackedForward({name: self.names[name] for name in used}, used, others, forward)

    def _warn_of_later_layers(self, forward: Forward) -> None:
        """Warn once of layers after the head that are not in the optimizer."""
        if self._head_seen or tracing():
            return
        self._head_seen = True
        known = {id(self.leaf(p)) for p in self.names.values()}
        if (later := layers_after(forward, known)) is not None:
            warn_user(
                f"params: the head is {listed(forward.names)}, but a later layer has a parameter "
                f"of shape {tuple(later.shape)} that is not in the optimizer. If you replaced the "
                "model's last layer, create the optimizer again; or pass the head's parameters, "
                "params=[...]."
            )

    def warn(self, tracked: TrackedForward, more: str = "") -> None:
        """Warn once of slow parameters, with the reason, a remedy, and ``more``."""
        forward = tracked.forward
        assert forward is not None
        plan = forward.plan
        # If gradients are zero now, the next step knows more
        if self._warned or not plan.slow or plan.silent or tracing():
            return
        self._warned = True
        names = [forward.names[i] for i in plan.by_autograd]
        where = sorted({b.operation.removesuffix("0") for b in plan.slow})
        mixed = any(boundary.mixed for boundary in plan.slow)
        reason = (
            f"{', '.join(where)} mix the samples, as batch norm does in training mode"
            if mixed
            else f"no rule supports {', '.join(where)}"
        )
        advice = "fastdg.explain(losses, params=...) shows the cost of each parameter"
        if mixed:
            norms = any("BatchNorm" in name for name in where)
            advice = "Faster: " + "call eval() on the batch norms; or, " * norms
            advice += "for gradients of domains, run one forward per domain with final=False"
        warn_user(
            f"params: {listed(names)} take one call of autograd for each domain "
            f"(each sample, for variances), which is exact but slow, since {reason}. {advice}."
            + (f" {NAMES}." if any(name.startswith("param_groups[") for name in names) else "")
            + more
        )


def check_losses(losses: Tensor) -> None:
    """Raise unless ``losses`` is ``[N]``, floating, and has a graph."""
    if not isinstance(losses, Tensor):
        raise not_a_tensor(losses)
    if losses.dim() != 1:
        advice = (
            "Pass reduction='none' to the loss."
            if losses.dim() == 0
            else "Reduce to one loss per sample, such as losses.flatten(1).mean(1)."
        )
        raise ValueError(f"losses: expected shape (N,), got {tuple(losses.shape)}. {advice}")
    if losses.numel() == 0:
        raise ValueError("losses: expected at least one sample, got an empty batch.")
    if not losses.is_floating_point():
        raise TypeError(
            f"losses: expected a floating dtype, got {losses.dtype}. Pass the losses first, the "
            "domains second."
        )
    if losses.grad_fn is None:
        raise ValueError(
            "losses: they have no graph (no grad_fn). Compute them outside torch.no_grad and "
            "torch.inference_mode, without detach, from a model whose parameters require gradients."
        )
