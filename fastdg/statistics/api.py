"""The statistics on their own, of any losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..domains import Partition, partition
from ..factors import PerSampleGrad
from ..gradients.explain import Explanation, explanation
from ..gradients.tape import Tape, TrackedForward, check_losses
from .moments import DomainMoments
from .record import Params, tape_and_tensors, tape_of
from .small import Small


def explain(losses: Tensor, params: Params) -> Explanation:
    """Return a table of how the per-sample gradients of each parameter are made, and at which cost.

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
    tracked = tape_of(params).resolve(losses, warn=False)
    assert tracked.forward is not None
    return explanation(tracked.forward)


def _by_name(
    tape: Tape,
    losses: Tensor,
    compute: Callable[[PerSampleGrad], Tensor],
    retain_graph: bool,
    means: Small[str] | None = None,
) -> dict[str, Tensor]:
    """Compute a value of each parameter's gradients; ``means`` takes small parameters, if given."""
    out: dict[str, Tensor] = {}

    def use(name: str, factor: PerSampleGrad) -> None:
        if means is None or not means.takes(name, factor):
            out[name] = compute(factor)

    tracked = tape.resolve(losses)
    tracked.collect(use, retain_graph=retain_graph)
    if means is not None:
        out.update((name, mean) for name, (mean, _) in means.results().items())
    return {name: out[name] for name in tracked.chosen if name in out}


def moments_of(
    tracked: TrackedForward,
    parts: Partition,
    *,
    create_graph: bool,
    retain_graph: bool,
    extra: Sequence[Tensor] = (),
    scale: Tensor | None = None,
    to_grad: bool = False,
) -> tuple[DomainMoments, list[Tensor | None]]:
    """Return moments of the chosen parameters, and ordinary gradients of ``losses.sum()`` for
    ``extra``; ``scale`` and ``to_grad`` as in `TrackedForward.collect`."""
    small: Small[str] = Small(parts, variance=True)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def use(name: str, factor: PerSampleGrad) -> None:
        if create_graph or not small.takes(name, factor):
            found[name] = factor.moments(parts)

    rest = tracked.collect(
        use,
        create_graph=create_graph,
        retain_graph=retain_graph,
        extra=extra,
        scale=scale,
        to_grad=to_grad,
    )
    found.update(small.results())  # type: ignore[arg-type]
    mean = {name: found[name][0] for name in tracked.chosen if name in found}
    variance = {name: found[name][1] for name in mean}
    return DomainMoments(mean, variance, parts.count), rest


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
        tape: the parameters, as `record` or a wrapper's ``opt.tape`` names them; leave it out if
            you pass ``params``.
        losses: per-sample losses ``[N]``.
        domains: domain of each sample ``[N]``, integer.
        params: the parameters, in place of a tape: a model, an optimizer, a parameter,
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
    asked, losses, domains = tape_and_tensors((tape, losses, domains), params, 2)
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
    asked, losses, domains = tape_and_tensors((tape, losses, domains), params, 2)
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
    asked, losses, domains = tape_and_tensors((tape, losses, domains), params, 2)
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
    asked, losses = tape_and_tensors((tape, losses), params, 1)
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
    asked, losses = tape_and_tensors((tape, losses), params, 1)
    squares = _by_name(asked, losses, lambda factor: factor.norms(), retain_graph)
    return torch.stack(list(squares.values())).sum(0).sqrt()
