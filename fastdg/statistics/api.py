"""The statistics on their own, of any losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..domains import Partition, partition
from ..factors import Factor, weighted_sum
from ..gradients.explain import Explanation, explanation
from ..gradients.plain import gradients_of
from ..gradients.sharded import leaf_of
from ..gradients.tape import Resolved, Tape, check_losses
from ..selection import Selection, listed, select
from .moments import DomainMoments
from .small import Small

Params = nn.Module | Optimizer | Tape | Tensor | Iterable[Tensor] | Mapping[str, Tensor]
# Relative to what rounding can do: the sum of the norms of what is added up.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@contextmanager
def record(model: nn.Module, params: Selection = "all", *, check: bool = True) -> Iterator[Tape]:
    """Name the parameters that the functions of this module are asked about.

    Args:
        model: the module whose parameters are meant.
        params: ``"head"`` (the parameters of the last layer before the losses), ``"all"``, a list
            of names or parameters, or a predicate ``(name, parameter)``.
        check: has no effect any more: which row belongs to which sample is found exactly.

    Nothing is recorded: all that is needed is in the graph of the losses. The functions take
    ``params=model`` just as well.

    Statistics run backward from ``losses.sum()``: hooks on activations (``tensor.register_hook``)
    see N times the gradient that ``losses.mean()`` gives them.

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
    yield Tape({p: name for name, p in named.items()}, params, leaf_of(model.modules))


def tape_of(params: Any) -> Tape:
    """The parameters that ``params`` names.

    Args:
        params: a model, an optimizer (a wrapper of fastdg among them), a tape, one parameter, a
            list of parameters, or a mapping from names to parameters.

    Raises:
        TypeError: ``params`` is something else.
        ValueError: it has no parameter that requires a gradient.
    """
    if isinstance(params, Tape):
        return params
    if isinstance(tape := getattr(params, "tape", None), Tape):
        return tape
    modules: Callable[[], Iterable[nn.Module]] = tuple
    named: dict[str, Tensor] = {}
    if isinstance(params, nn.Module):
        named, modules = dict(params.named_parameters()), params.modules
    elif isinstance(params, Optimizer):
        for g, group in enumerate(params.param_groups):
            known = group.get("param_names") or []
            for k, p in enumerate(group["params"]):
                named[known[k] if k < len(known) else f"param_groups[{g}][{k}]"] = p
    elif isinstance(params, Mapping):
        named = dict(params)
    elif isinstance(params, Iterable):
        items = [params] if isinstance(params, Tensor) else list(params)
        named = {f"params[{k}]": p for k, p in enumerate(items)}
    if (not named and not isinstance(params, (nn.Module, Iterable))) or any(
        not isinstance(p, Tensor) for p in named.values()
    ):
        raise TypeError(
            "params: expected a model, an optimizer, a tape, a parameter, a list of parameters or "
            f"a mapping from names to them, got {type(params).__name__}"
        )
    if not any(p.requires_grad for p in named.values()):
        raise ValueError("params: none of them requires a gradient")
    return Tape({p: name for name, p in named.items()}, "all", leaf_of(modules))


def _asked(given: Sequence[Any], params: Any, wanted: int) -> tuple[Any, ...]:
    """``(tape, losses, ...)`` from ``(tape, losses, ...)`` or ``(losses, ..., params=)``."""
    first, *others = [x for x in given if x is not None] or [None]
    if params is not None:
        if isinstance(first, Tape):
            raise TypeError("params: expected either a tape or params=, got both")
        tape, rest = tape_of(params), [first, *others]
    elif isinstance(first, Tape):
        tape, rest = first, others
    elif isinstance(first, Tensor):
        raise TypeError(
            "params: expected whose gradients are meant, as in fastdg.domain_moments(losses, "
            "domains, params=model), got none"
        )
    else:
        raise TypeError(
            "tape: expected what `with fastdg.record(model) as tape:` gives, or a wrapper's "
            f"opt.tape, got {type(first).__name__}"
        )
    if len(rest) != wanted:
        missing = ("losses", "domains")[len(rest) : wanted] or ("domains",)
        raise TypeError(f"{missing[0]}: expected {wanted} tensors in all, got {len(rest)}")
    return (tape, *rest)


def explain(losses: Tensor, params: Params) -> Explanation:
    """A table of how the per-sample gradients of each parameter are made, and at which cost.

    Args:
        losses: per-sample losses ``[N]`` with their graph, which is kept.
        params: a model, an optimizer, a tape, a list of parameters, or a mapping from names to
            them.

    Raises:
        TypeError, ValueError: an argument is not as described.
        RuntimeError: the losses depend on none of the parameters.

    Example:
        >>> print(fastdg.explain(losses, model))
    """
    resolved = tape_of(params).resolve(losses, warn=False)
    assert resolved.forward is not None
    return explanation(resolved.forward)


def _by_name(
    tape: Tape,
    losses: Tensor,
    compute: Callable[[Factor], Tensor],
    retain_graph: bool,
    means: Small[str] | None = None,
) -> dict[str, Tensor]:
    """What is computed of each parameter's gradients; of small ones the ``means``, if wanted."""
    out: dict[str, Tensor] = {}

    def use(name: str, factor: Factor) -> None:
        if means is None or not means.takes(name, factor):
            out[name] = compute(factor)

    resolved = tape.resolve(losses)
    resolved.collect(use, retain_graph=retain_graph)
    if means is not None:
        out.update((name, mean) for name, (mean, _) in means.results().items())
    return {name: out[name] for name in resolved.chosen if name in out}


def moments_of(
    resolved: Resolved,
    parts: Partition,
    *,
    create_graph: bool,
    retain_graph: bool,
    extra: Sequence[Tensor] = (),
    scale: Tensor | None = None,
) -> tuple[DomainMoments, list[Tensor | None]]:
    """Moments of the chosen parameters, and ordinary gradients of ``losses.sum()`` for
    ``extra``; ``scale`` as in `Resolved.collect`."""
    small: Small[str] = Small(parts, variance=True)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def use(name: str, factor: Factor) -> None:
        if create_graph or not small.takes(name, factor):
            found[name] = factor.moments(parts)

    rest = resolved.collect(
        use, create_graph=create_graph, retain_graph=retain_graph, extra=extra, scale=scale
    )
    with torch.no_grad():
        found.update(small.results())  # type: ignore[arg-type]
    names = [name for name in resolved.chosen if name in found]
    moments = DomainMoments(
        {n: found[n][0] for n in names}, {n: found[n][1] for n in names}, parts.count
    )
    return moments, rest


def domain_moments(
    tape: Tape | Tensor | None = None,
    losses: Tensor | None = None,
    domains: Tensor | None = None,
    *,
    params: Params | None = None,
    num_domains: int | None = None,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> DomainMoments:
    r"""Mean and biased variance of per-sample gradients in each domain.

    .. math:: m_d = \frac1{n_d}\sum_{i\in d} g_i,\qquad v_d = \frac1{n_d}\sum_{i\in
              d}(g_i-m_d)^2,\qquad g_i = \nabla_\theta \ell_i

    Call it as ``domain_moments(losses, domains, params=model)``, or with a tape.

    Args:
        tape: whose gradients are meant, from `record` or a wrapper's ``opt.tape``; left out where
            ``params`` is given.
        losses: per-sample losses ``[N]``.
        domains: domain of each sample ``[N]``, integer.
        params: whose gradients are meant, in place of a tape: a model, an optimizer, a parameter,
            a list of parameters, or a mapping from names to them.
        num_domains: D; default one more than the largest id.
        create_graph: make the result differentiable with respect to the model's parameters.
        retain_graph: keep the graph, so that the losses can be used again.

    Returns:
        `DomainMoments`; statistics are fp32 (fp64 for an fp64 model). An empty domain has zeros, a
        domain of one sample has variance 0, NaN losses give NaN.

    Raises:
        ValueError, TypeError: ``losses`` or ``domains`` are not as described.
        RuntimeError: the losses depend on none of the parameters, or their graph was freed.

    Reference:
        Rame, Dancette, Cord: Fishr: Invariant Gradient Variances for Out-of-Distribution
        Generalization, ICML 2022.
    """
    asked, losses, domains = _asked((tape, losses, domains), params, 2)
    check_losses(losses)
    parts = partition(domains, losses, num_domains)
    moments, _ = moments_of(
        asked.resolve(losses), parts, create_graph=create_graph, retain_graph=retain_graph
    )
    return moments


def domain_gradients(
    tape: Tape | Tensor | None = None,
    losses: Tensor | None = None,
    domains: Tensor | None = None,
    *,
    params: Params | None = None,
    num_domains: int | None = None,
    retain_graph: bool = True,
) -> dict[str, Tensor]:
    r"""Gradient of each domain's mean loss, :math:`G_d = \frac1{n_d}\sum_{i\in d}\nabla\ell_i`, in
    one backward.

    Arguments as `domain_moments`. Returns name -> ``[D, *shape]``; zeros for an empty domain.
    """
    asked, losses, domains = _asked((tape, losses, domains), params, 2)
    check_losses(losses)
    parts = partition(domains, losses, num_domains)
    small: Small[str] = Small(parts, variance=False)
    return _by_name(asked, losses, lambda factor: factor.domain(parts), retain_graph, small)


def domain_gram(
    tape: Tape | Tensor | None = None,
    losses: Tensor | None = None,
    domains: Tensor | None = None,
    *,
    params: Params | None = None,
    num_domains: int | None = None,
    retain_graph: bool = True,
) -> Tensor:
    r"""Inner products :math:`\langle G_d, G_e\rangle` of the domains' gradients over all tracked
    parameters.

    Arguments as `domain_moments`. Returns ``[D, D]``; no more than one layer's gradients exist at
    a time.
    """
    asked, losses, domains = _asked((tape, losses, domains), params, 2)
    check_losses(losses)
    parts = partition(domains, losses, num_domains)
    grams = _by_name(asked, losses, lambda factor: factor.gram(parts), retain_graph)
    return torch.stack(list(grams.values())).sum(0)


def per_sample_gradients(
    tape: Tape | Tensor | None = None,
    losses: Tensor | None = None,
    *,
    params: Params | None = None,
    retain_graph: bool = True,
) -> dict[str, Tensor]:
    r"""The gradients :math:`g_i` themselves. Returns name -> ``[N, *shape]``: N copies of the
    parameters."""
    asked, losses = _asked((tape, losses), params, 1)
    return _by_name(asked, losses, lambda factor: factor.per_sample(), retain_graph)


def per_sample_norms(
    tape: Tape | Tensor | None = None,
    losses: Tensor | None = None,
    *,
    params: Params | None = None,
    retain_graph: bool = True,
) -> Tensor:
    r"""Norms :math:`\|g_i\|_2` over all tracked parameters, ``[N]``, without forming the
    gradients."""
    asked, losses = _asked((tape, losses), params, 1)
    squares = _by_name(asked, losses, lambda factor: factor.norms(), retain_graph)
    return torch.stack(list(squares.values())).sum(0).sqrt()


def check(tape: Tape, losses: Tensor) -> None:
    r"""Compare :math:`\sum_i w_i g_i` of the per-sample gradients with autograd's gradient of
    :math:`\sum_i w_i \ell_i`, for random :math:`w` (two backward passes).

    There is no need to: which row belongs to which sample is found exactly. It guards rules of your
    own.

    Args:
        tape: from `record`, or a wrapper's ``opt.tape``.
        losses: ``[N]``, whose graph is kept.

    Raises:
        RuntimeError: names the first parameter whose gradients do not agree.
    """
    tape, losses = _asked((tape, losses), None, 1)
    resolved = tape.resolve(losses)
    generator = torch.Generator("cpu").manual_seed(0)  # the user's random stream is not touched
    weights = 0.5 + torch.rand(losses.shape[0], generator=generator, dtype=torch.float64)
    w = weights.to(losses)
    expected = gradients_of(losses, list(resolved.leaves.values()), w)
    got: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}

    def use(name: str, factor: Factor) -> None:
        with torch.no_grad():
            got[name] = weighted_sum(factor, w)
            norms[name] = (factor.norms().sqrt() * w).sum()

    resolved.collect(use, retain_graph=True)
    worst = max((float(s) for s in norms.values()), default=0.0)
    for (name, p), reference in zip(resolved.leaves.items(), expected, strict=True):
        reference = torch.zeros_like(p) if reference is None else reference
        if reference.layout != torch.strided:
            reference = reference.to_dense()
        captured = got.get(name, torch.zeros_like(p))
        size = max(float(norms.get(name, 0.0)), float(reference.norm()), 1e-3 * worst)
        error = float((captured.to(reference.dtype) - reference).norm())
        dtypes = {p.dtype, losses.dtype}
        if error > max(TOLERANCE.get(dtype, 1e-4) for dtype in dtypes) * size:
            raise RuntimeError(
                f"params: the per-sample gradients of {name!r} do not add up to autograd's "
                f"gradient, relative difference {error / size:.1e}. Look at the rule that serves "
                "it, which fastdg.explain names, and at hooks on activations that change gradients"
            )
