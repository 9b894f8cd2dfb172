"""The statistics on their own: record a forward, then ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..domains import Partition, partition, tracing
from .check import Checks
from .collect import adopt, choose_head, collect, refuse_mixing
from .factors import Factor
from .graph import Found, find
from .moments import DomainMoments
from .selection import listed, select
from .tape import Call, Recorder, Selection


class Resolved(NamedTuple):
    """What a forward left behind for these losses.

    Attributes:
        found: the calls that use one of the parameters asked for.
        owned: local -> full names of the parameters that each call answers for.
        chosen: the parameters asked for that were used.
        leaves: the tensors that the forward used as these, which FSDP2 makes others.
    """

    found: Found
    owned: dict[Call, dict[str, str]]
    chosen: dict[str, Tensor]
    leaves: dict[str, Tensor]

    @property
    def rest(self) -> list[Tensor]:
        """Other tensors that a backward gives a ``.grad``."""
        tracked = set(self.leaves.values())
        return [leaf for leaf in self.found.leaves if leaf not in tracked]


class Tape:
    """What a forward left behind: who may be asked for per-sample gradients. Made by `record`."""

    def __init__(self, recorder: Recorder, params: Selection, check: bool = True) -> None:
        self.recorder, self.params, self.check = recorder, params, check
        self.checks = Checks()

    def resolve(self, losses: Tensor, scale: Tensor | None = None) -> Resolved:
        """Find the forward below ``losses``; check what was not yet checked, at ``scale``."""
        check_losses(losses)
        named = {name: p for p, name in self.recorder.names.values() if p.requires_grad}
        root = losses.grad_fn
        assert root is not None
        head = isinstance(self.params, str) and self.params == "head"
        found = find(root, self.recorder, until=self.recorder.last if head else None)
        if not any(call.parameters for call in found.calls):
            raise _unseen(found)
        names, leaves = self.recorder.names, {id(leaf) for leaf in found.leaves}
        owned = adopt(found, self.recorder.used(), leaves)
        if head:
            last = choose_head(found).calls
            chosen = {name: named[name] for call in last for name in owned[call].values()}
        else:
            used = {name for own in owned.values() for name in own.values()}
            wanted = named
            if self.params != "all":
                # A frozen parameter may be asked for: it takes part from when it is unfrozen.
                selected = select(self.params, {name: p for p, name in names.values()})
                wanted = {name: p for name, p in named.items() if selected(name, p)}
            chosen = {name: p for name, p in wanted.items() if name in used}
            if len(chosen) < len(wanted):
                self._refuse_unused(found, wanted.keys() - chosen.keys(), leaves)
            if not chosen:
                raise RuntimeError(
                    "params: none of the selected parameters was used in this forward; "
                    f"used: {sorted(used)}"
                )
        calls = [c for c in found.calls if any(name in chosen for name in owned[c].values())]
        refuse_mixing(found, calls)
        found = found.keep(calls)
        used_as = chosen
        if self.recorder.leaves:
            used_as = {name: self.recorder.leaf(p) for name, p in chosen.items()}
        if self.check and not tracing() and not any(call.forgotten for call in calls):
            self.checks.verify(losses, found, owned, used_as, scale)
        return Resolved(found, owned, chosen, used_as)

    def _refuse_unused(self, found: Found, names: Set[str], leaves: Set[int]) -> None:
        """Raise if one of ``names`` was used behind the back of every recorded call."""
        leaf = self.recorder.leaf
        unused = [(name, leaf(p)) for p, name in self.recorder.names.values() if name in names]
        unseen = [name for name, p in unused if id(p) in leaves]
        if unseen and found.compiled:
            raise RuntimeError(f"params: {unseen[0]!r} was not seen. {COMPILED}")
        if self.check:
            self.checks.refuse_unseen(unseen)
            if found.hidden:
                self.checks.refuse_hidden([name for name, _ in unused])

    def reached(self, losses: Tensor) -> Resolved:
        """The tracked parameters below ``losses``, of which the sum over the samples is wanted."""
        assert losses.grad_fn is not None
        found = find(losses.grad_fn, self.recorder)
        leaves = {id(leaf) for leaf in found.leaves}
        used = {name: self.recorder.leaf(p) for p, name in self.recorder.names.values()}
        chosen = {name: p for p, name in self.recorder.names.values() if id(used[name]) in leaves}
        if not chosen:
            raise _unseen(found)
        return Resolved(found, {}, chosen, {name: used[name] for name in chosen})


COMPILED = (
    "Hooks do not see into a module that torch.compile has compiled. Ways out: leave the model as "
    "it is, and compile its forward and opt.backward together: fastdg.compiled(opt, forward); or "
    "compile only modules below those that are tracked (all but the head, if that is all that is "
    "looked at)"
)


def _unseen(found: Found) -> RuntimeError:
    if found.compiled:
        return RuntimeError(f"losses: no tracked layer was seen below them. {COMPILED}")
    return RuntimeError(
        "losses: no tracked layer was seen in the forward that made them. The model has to run "
        "after this object was made, outside torch.no_grad and torch.func, and losses must depend "
        "on it; for a stateless model use fastdg.func, for a compiled one fastdg.compiled"
    )


def check_losses(losses: Tensor) -> None:
    """Raise unless ``losses`` is ``[N]``, floating, and has a graph."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses: expected a tensor (N,), got {type(losses).__name__}")
    if losses.dim() != 1:
        advice = (
            "pass reduction='none' to the loss"
            if losses.dim() == 0
            else "reduce every sample's to one, as by losses.flatten(1).mean(1)"
        )
        raise ValueError(f"losses: expected shape (N,), got {tuple(losses.shape)}; {advice}")
    if losses.numel() == 0:
        raise ValueError("losses: expected at least one sample, got an empty batch")
    if not losses.is_floating_point():
        raise TypeError(f"losses: expected a floating dtype, got {losses.dtype}")
    if losses.grad_fn is None:
        raise ValueError(
            "losses: they have no graph (no grad_fn); compute them outside torch.no_grad and "
            "without detach, from a model whose parameters require gradients"
        )


@contextmanager
def record(model: nn.Module, params: Selection = "all", *, check: bool = True) -> Iterator[Tape]:
    """Record a forward, for the functions of this module.

    Args:
        model: the module whose layers are watched inside the ``with`` block.
        params: ``"head"`` (the last module with tracked parameters that ran), ``"all"``, a list of
            names or parameters, or a predicate ``(name, parameter)``.
        check: compare the captured gradients with autograd's the first time a layer is used (two
            further backward passes).

    Statistics run backward from ``losses.sum()``: hooks on activations (``tensor.register_hook``)
    see N times the gradient that ``losses.mean()`` gives them, and a hook that does something
    nonlinear to it, such as clamping, acts on that.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> with fastdg.record(model) as tape:
        ...     losses = F.cross_entropy(model(x), y, reduction="none")
        >>> fastdg.domain_moments(tape, losses, domains).variance["0.weight"]  # (D, O, I)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    named = dict(model.named_parameters())
    if not any(p.requires_grad for p in named.values()):
        raise ValueError("model: it has no parameter that requires a gradient")
    if not callable(params):
        params = listed(params) if isinstance(params, Iterable) else params
        select(params, named)
    recorder = Recorder({p: name for name, p in named.items()}, model)
    try:
        yield Tape(recorder, params, check)
    finally:
        recorder.close()


def _check_tape(tape: Tape) -> None:
    if not isinstance(tape, Tape):
        raise TypeError(
            "tape: expected what `with fastdg.record(model) as tape:` gives, or a wrapper's "
            f"opt.tape, got {type(tape).__name__}"
        )


def _partition(tape: Tape, losses: Tensor, domains: Tensor, num_domains: int | None) -> Partition:
    _check_tape(tape)
    check_losses(losses)
    return partition(domains, losses, num_domains)


def _by_name(
    tape: Tape,
    losses: Tensor,
    compute: Callable[[Factor], Tensor],
    retain_graph: bool,
) -> dict[str, Tensor]:
    _check_tape(tape)
    out: dict[str, Tensor] = {}

    def use(name: str, factor: Factor) -> None:
        with torch.no_grad():
            out[name] = compute(factor)

    found, owned, chosen, _ = tape.resolve(losses)
    collect(losses, found, owned, chosen.__contains__, use, retain_graph=retain_graph)
    return {name: out[name] for name in chosen if name in out}


def moments_of(
    losses: Tensor,
    resolved: Resolved,
    parts: Partition,
    *,
    create_graph: bool,
    retain_graph: bool,
    extra: Sequence[Tensor] = (),
    scale: Tensor | None = None,
) -> tuple[DomainMoments, list[Tensor | None]]:
    """Moments of the chosen parameters, and ordinary gradients of ``losses.sum()`` for
    ``extra``; ``scale`` as in `collect`."""
    mean: dict[str, Tensor] = {}
    variance: dict[str, Tensor] = {}

    def use(name: str, factor: Factor) -> None:
        with torch.set_grad_enabled(create_graph):
            mean[name], variance[name] = factor.moments(parts)

    rest = collect(
        losses,
        resolved.found,
        resolved.owned,
        resolved.chosen.__contains__,
        use,
        create_graph=create_graph,
        retain_graph=retain_graph,
        extra=extra,
        scale=scale,
    )
    names = [name for name in resolved.chosen if name in mean]
    moments = DomainMoments(
        {n: mean[n] for n in names}, {n: variance[n] for n in names}, parts.count
    )
    return moments, rest


def domain_moments(
    tape: Tape,
    losses: Tensor,
    domains: Tensor,
    *,
    num_domains: int | None = None,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> DomainMoments:
    r"""Mean and biased variance of per-sample gradients in each domain.

    .. math:: m_d = \frac1{n_d}\sum_{i\in d} g_i,\qquad v_d = \frac1{n_d}\sum_{i\in
              d}(g_i-m_d)^2,\qquad g_i = \nabla_\theta \ell_i

    Args:
        tape: of the forward that made ``losses``.
        losses: per-sample losses ``[N]``.
        domains: domain of each sample ``[N]``, integer.
        num_domains: D; default one more than the largest id.
        create_graph: make the result differentiable with respect to the model's parameters.
        retain_graph: keep the graph, so that the losses can be used again.

    Returns:
        `DomainMoments`; statistics are fp32 (fp64 for an fp64 model). An empty domain has zeros, a
        domain of one sample has variance 0, NaN losses give NaN.

    Raises:
        ValueError, TypeError: ``losses`` or ``domains`` are not as described.
        RuntimeError: no tracked layer was seen, or the captured gradients are not autograd's.

    Reference:
        Rame, Dancette, Cord: Fishr: Invariant Gradient Variances for Out-of-Distribution
        Generalization, ICML 2022.
    """
    parts = _partition(tape, losses, domains, num_domains)
    resolved = tape.resolve(losses)
    moments, _ = moments_of(
        losses, resolved, parts, create_graph=create_graph, retain_graph=retain_graph
    )
    return moments


def domain_gradients(
    tape: Tape,
    losses: Tensor,
    domains: Tensor,
    *,
    num_domains: int | None = None,
    retain_graph: bool = True,
) -> dict[str, Tensor]:
    r"""Gradient of each domain's mean loss, :math:`G_d = \frac1{n_d}\sum_{i\in d}\nabla\ell_i`, in
    one backward.

    Arguments as `domain_moments`. Returns name -> ``[D, *shape]``; zeros for an empty domain.
    """
    parts = _partition(tape, losses, domains, num_domains)
    return _by_name(tape, losses, lambda factor: factor.domain(parts), retain_graph)


def domain_gram(
    tape: Tape,
    losses: Tensor,
    domains: Tensor,
    *,
    num_domains: int | None = None,
    retain_graph: bool = True,
) -> Tensor:
    r"""Inner products :math:`\langle G_d, G_e\rangle` of the domains' gradients over all tracked
    parameters.

    Arguments as `domain_moments`. Returns ``[D, D]``; no more than one layer's gradients exist at
    a time.
    """
    parts = _partition(tape, losses, domains, num_domains)
    grams = _by_name(tape, losses, lambda factor: factor.gram(parts), retain_graph)
    return torch.stack(list(grams.values())).sum(0)


def per_sample_gradients(
    tape: Tape, losses: Tensor, *, retain_graph: bool = True
) -> dict[str, Tensor]:
    r"""The gradients :math:`g_i` themselves. Returns name -> ``[N, *shape]``: N copies of the
    parameters."""
    return _by_name(tape, losses, lambda factor: factor.per_sample(), retain_graph)


def per_sample_norms(tape: Tape, losses: Tensor, *, retain_graph: bool = True) -> Tensor:
    r"""Norms :math:`\|g_i\|_2` over all tracked parameters, ``[N]``, without forming the
    gradients."""
    squares = _by_name(tape, losses, lambda factor: factor.norms(), retain_graph)
    return torch.stack(list(squares.values())).sum(0).sqrt()


def check(tape: Tape, losses: Tensor) -> None:
    """Compare the captured per-sample gradients with autograd's, now (two further backward passes).

    Args:
        tape: from `record`, or a wrapper's ``opt.tape``.
        losses: ``[N]``, made by the recorded forward.

    Raises:
        RuntimeError: names the first parameter whose gradients do not agree, and the likely cause.
    """
    _check_tape(tape)
    before = tape.check, tape.checks
    tape.check, tape.checks = True, Checks()
    try:
        tape.resolve(losses)
    finally:
        tape.check, tape.checks = before
