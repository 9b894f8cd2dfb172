"""Gradient statistics in functional form, for stateless code.

``loss(params, *sample)`` is one sample's loss. ``torch.func.vmap(torch.func.grad(loss))`` runs in
chunks of the batch: forward and backward hold the per-sample gradients of one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._torch import pytree
from .domains import Partition, partition
from .factors import flat
from .statistics.chunked_vmap import stream
from .statistics.moments import DomainMoments
from .statistics.problem import Problem
from .statistics.random_state import Randomness
from .statistics.reductions import Moments, Norms, Samples

__all__ = [
    "domain_gradients",
    "domain_gram",
    "domain_moments",
    "per_sample_gradients",
    "per_sample_norms",
]

# Bytes of per-sample gradients in a chunk, if chunk_size is None.
CHUNK_BUDGET = 256 * 2**20


def domain_moments(
    loss: Callable[..., Tensor],
    params: Any,
    *batch: Any,
    domains: Tensor,
    num_domains: int | None = None,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> DomainMoments:
    r"""Compute mean and biased variance of the per-sample gradients of each domain.

    .. math:: m_d = \frac1{n_d}\sum_{i\in d} g_i,\qquad
              v_d = \frac1{n_d}\sum_{i\in d}(g_i-m_d)^2,\qquad
              g_i = \nabla_\theta\,\ell(\theta, x_i)

    Differentiable once, with respect to ``params`` and to the floating tensors of the batch. The
    backward recomputes each chunk.

    Args:
        loss: ``loss(params, *sample)``, the loss of one sample: 0-dim, floating. It runs under
            `torch.func.vmap`, so it must not have side effects or branch on tensor values. Other
            tensors in its closure must not require a gradient (a forward of one sample checks this,
            except under ``torch.no_grad()``).
        params: name -> floating tensor, or any nesting of dicts, lists and tuples of them. The
            name of a nested tensor is its path, ``"encoder.0.weight"``.
        batch: tensors with the sample in dimension 0, ``[N, *]`` of any dtype, or nestings of them.
        domains: domain of each sample ``[N]``, integer, on the device of ``params`` or the CPU.
        num_domains: D. Default: the largest id plus one.
        chunk_size: samples per chunk. Default: as many as fit in 256 MiB, at least one. A backward
            holds three times as much.
        randomness: as in `torch.func.vmap`: ``"error"``, ``"different"`` or ``"same"`` random
            numbers for all samples. A backward draws the same numbers again. ``torch.compile``
            cannot do this and takes ``"error"`` only.

    Returns:
        `DomainMoments`; fp32, or fp64 for fp64 parameters. An empty domain has zeros, a domain of
        one sample has variance 0, and a NaN loss gives NaN in its domain.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Rame, Dancette, Cord: Fishr: Invariant Gradient Variances for Out-of-Distribution
        Generalization, ICML 2022.

    Example:
        >>> model = torch.nn.Linear(5, 3)
        >>> x, y = torch.randn(8, 5), torch.arange(8) % 3
        >>> def loss(params, x, y):
        ...     return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)
        >>> params = dict(model.named_parameters())
        >>> moments = fastdg.func.domain_moments(loss, params, x, y, domains=torch.arange(8) % 2)
        >>> moments.variance["weight"].shape
        torch.Size([2, 3, 5])
        >>> penalty = (moments.variance["weight"][0] - moments.variance["weight"][1]).square().sum()
        >>> penalty.backward()
    """
    problem, tensors = _problem(loss, params, batch, chunk_size, randomness)
    parts = _partition(domains, problem, tensors, num_domains)
    out = stream(Moments, problem, tensors, parts.domains, parts.num_domains)
    count = len(problem.names)
    mean, variance = (
        dict(zip(problem.names, half, strict=True)) for half in (out[:count], out[count:])
    )
    return DomainMoments(mean, variance, parts.count)


def domain_gradients(
    loss: Callable[..., Tensor],
    params: Any,
    *batch: Any,
    domains: Tensor,
    num_domains: int | None = None,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> dict[str, Tensor]:
    r"""Compute the gradient of each domain's mean loss.

    .. math:: G_d = \frac1{n_d}\sum_{i\in d}\nabla\ell_i

    This is the mean of `domain_moments`: same arguments, errors and derivatives.

    Returns:
        name -> ``[D, *shape]``; zeros for an empty domain.

    Example:
        >>> gradients = fastdg.func.domain_gradients(loss, params, x, y, domains=domains)
    """
    return domain_moments(
        loss,
        params,
        *batch,
        domains=domains,
        num_domains=num_domains,
        chunk_size=chunk_size,
        randomness=randomness,
    ).mean


def domain_gram(
    loss: Callable[..., Tensor],
    params: Any,
    *batch: Any,
    domains: Tensor,
    num_domains: int | None = None,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Tensor:
    r"""Compute the inner products :math:`\langle G_d, G_e\rangle` of the domains' gradients.

    A product sums over all tensors of ``params``. Arguments, errors and derivatives as in
    `domain_moments`.

    Returns:
        ``[D, D]``, symmetric; zero rows for an empty domain.

    Example:
        >>> gram = fastdg.func.domain_gram(loss, params, x, y, domains=domains)
    """
    gradients = domain_gradients(
        loss,
        params,
        *batch,
        domains=domains,
        num_domains=num_domains,
        chunk_size=chunk_size,
        randomness=randomness,
    )
    return torch.stack([g @ g.t() for g in map(flat, gradients.values())]).sum(0)


def per_sample_gradients(
    loss: Callable[..., Tensor],
    params: Any,
    *batch: Any,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> dict[str, Tensor]:
    r"""Compute the per-sample gradients :math:`g_i`.

    Arguments, errors and derivatives as in `domain_moments`.

    Returns:
        name -> ``[N, *shape]``: N copies of the parameters, filled chunk by chunk.

    Example:
        >>> samples = fastdg.func.per_sample_gradients(loss, params, x, y)
    """
    problem, tensors = _problem(loss, params, batch, chunk_size, randomness)
    out = stream(Samples, problem, tensors, _no_domains(problem, tensors), 1)
    return dict(zip(problem.names, out, strict=True))


def per_sample_norms(
    loss: Callable[..., Tensor],
    params: Any,
    *batch: Any,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Tensor:
    r"""Compute the per-sample norms :math:`\|g_i\|_2` over all tensors of ``params``.

    Arguments, errors and derivatives as in `domain_moments`. The gradient of a norm 0 is 0.

    Returns:
        ``[N]``.

    Example:
        >>> norms = fastdg.func.per_sample_norms(loss, params, x, y)
    """
    problem, tensors = _problem(loss, params, batch, chunk_size, randomness)
    return stream(Norms, problem, tensors, _no_domains(problem, tensors), 1)[0]


def _problem(
    loss: Callable[..., Tensor],
    params: Any,
    batch: tuple[Any, ...],
    chunk_size: int | None,
    randomness: Randomness,
) -> tuple[Problem, list[Tensor]]:
    """Check and flatten the arguments: tensors of ``params``, then tensors of the batch."""
    if not callable(loss):
        raise TypeError(
            f"loss: expected a function loss(params, *sample), got {type(loss).__name__}."
        )
    if randomness not in ("error", "different", "same"):
        raise ValueError(
            f"randomness: expected 'error', 'different' or 'same', got {randomness!r}."
        )
    if randomness != "error" and torch.compiler.is_compiling():
        raise ValueError(
            f"randomness: expected 'error' under torch.compile, got {randomness!r}. Pass "
            "random numbers in the batch: a compiled backward cannot draw the same numbers again."
        )
    named = _named(params)
    rows, batch_spec = pytree.tree_flatten(batch)
    if not rows:
        raise ValueError("batch: expected tensors with the sample in dimension 0, got none.")
    for tensor in rows:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"batch: expected tensors with the sample in dimension 0, got "
                f"{type(tensor).__name__}. Let loss close over values that all samples share."
            )
        if tensor.dim() == 0:
            raise ValueError("batch: expected the sample in dimension 0, got a 0-dim tensor.")
    sizes = [tensor.shape[0] for tensor in rows]
    if any(size != sizes[0] for size in sizes):
        raise ValueError(f"batch: expected one number of samples in all tensors, got {sizes}.")
    if sizes[0] == 0:
        raise ValueError("batch: expected at least one sample, got an empty batch.")
    if chunk_size is None:
        size = sum(p.numel() * max(p.element_size(), 4) for p in named.values())
        chunk_size = max(1, CHUNK_BUDGET // max(size, 1))
    elif not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"chunk_size: expected None or an integer >= 1, got {chunk_size!r}.")
    problem = Problem(
        loss,
        tuple(named),
        pytree.tree_structure(params),
        batch_spec,
        sizes[0],
        min(chunk_size, sizes[0]),
        randomness,
    )
    return problem, [*named.values(), *rows]


def _named(params: Any) -> dict[str, Tensor]:
    """Map the path of each tensor of ``params`` to the tensor."""
    leaves, _ = pytree.tree_flatten_with_path(params)
    named: dict[str, Tensor] = {}
    for path, leaf in leaves:
        name = ".".join(str(_key(key)) for key in path)
        if not path or not isinstance(leaf, Tensor):
            where = f"params[{name!r}]" if path else "params"
            expected = "a tensor" if path else "a dict name -> tensor"
            raise TypeError(
                f"{where}: expected {expected}, got {type(leaf).__name__}. For a module "
                "pass dict(model.named_parameters())."
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"params[{name!r}]: expected a floating dtype, got {leaf.dtype}. Let loss "
                "close over tensors that need no gradient."
            )
        if name in named:
            raise ValueError(f"params: two tensors have the path {name!r}. Rename one.")
        named[name] = leaf
    if not named:
        raise ValueError("params: expected at least one tensor, got none. Pass the parameters.")
    return named


def _key(key: Any) -> Any:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _partition(
    domains: Tensor, problem: Problem, tensors: list[Tensor], num_domains: int | None
) -> Partition:
    return partition(domains, tensors[0].new_empty((problem.samples,)), num_domains)


def _no_domains(problem: Problem, tensors: list[Tensor]) -> Tensor:
    return torch.zeros(problem.samples, dtype=torch.int64, device=tensors[0].device)
