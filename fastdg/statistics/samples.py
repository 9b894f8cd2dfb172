"""Products of single samples' gradients, clipped sums, and noise of gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..domains import partition
from ..factors import PerSampleGrad, weighted_sum
from ..gradients.tape import check_losses
from .record import Params, tape_of


def per_sample_products(
    losses: Tensor,
    directions: Mapping[str, Tensor],
    *,
    params: Params,
    retain_graph: bool = True,
) -> Tensor:
    r"""Inner products :math:`\langle g_i, v_k\rangle` of each sample's gradient with directions.

    Args:
        losses: per-sample losses ``[N]``.
        directions: name of a parameter -> its part of the K directions ``[K, *shape]``, such as the
            result of `domain_gradients`. Parameters without a part have 0 there.
        params: the parameters: a model, an optimizer, a parameter, a list of parameters, a mapping
            from names to them, or a tape.
        retain_graph: keep the graph, so that the losses can be used again.

    Returns:
        ``[N, K]``, fp32 (fp64 for an fp64 model). A weight of a linear map is multiplied without
        forming a sample's gradient; other gradients are formed for one parameter at a time.

    With the gradients of domains as directions it tells which domain a sample pulls towards; with
    the gradient of validation data it is TracIn's influence of one step.

    Raises:
        TypeError, ValueError: an argument is not as described; no direction has a part for a
            parameter below the losses.

    Reference:
        Pruthi, Liu, Kale, Sundararajan: Estimating Training Data Influence by Tracing Gradient
        Descent, NeurIPS 2020.

    Example:
        >>> domain = fastdg.domain_gradients(losses, domains, params=model)
        >>> fastdg.per_sample_products(losses, domain, params=model)  # (N, D)
    """
    check_losses(losses)
    if not isinstance(directions, Mapping):
        raise TypeError(
            "directions: expected a mapping from parameters' names to tensors [K, *shape], got "
            f"{type(directions).__name__}. Pass fastdg.domain_gradients(...), or {{name: "
            "grad.unsqueeze(0)} of a single gradient."
        )
    sizes = {len(v) for v in directions.values() if isinstance(v, Tensor) and v.dim()}
    if len(sizes) != 1:
        raise ValueError(
            f"directions: expected tensors [K, *shape] with one K, got sizes {sorted(sizes)}. "
            "Stack the directions, or unsqueeze(0) a single one."
        )
    tracked = tape_of(params).resolve(losses)
    total: list[Tensor] = []

    def use(name: str, factor: PerSampleGrad) -> None:
        given = directions.get(name)
        if given is None:
            return
        if given.shape[1:] != torch.Size(factor.shape):
            raise ValueError(
                f"directions: expected (K, *{tuple(factor.shape)}) for {name}, got "
                f"{tuple(given.shape)}."
            )
        total.append(factor.products(given.detach()))

    with torch.no_grad():
        tracked.collect(use, retain_graph=retain_graph)
    if not total:
        raise ValueError(
            f"directions: none of {sorted(directions)} is a parameter below the losses. Use the "
            f"names {sorted(tracked.chosen)}."
        )
    return torch.stack(total).sum(0)


def per_sample_gram(losses: Tensor, *, params: Params, retain_graph: bool = True) -> Tensor:
    r"""Inner products :math:`\langle g_i, g_j\rangle` of the samples' gradients, ``[N, N]``.

    Arguments, errors as `per_sample_products`. A weight of a linear map that is applied once a
    sample costs two products ``[N, I] [I, N]``; other gradients are formed for one parameter at a
    time.
    """
    check_losses(losses)
    total: list[Tensor] = []
    with torch.no_grad():
        tape_of(params).resolve(losses).collect(
            lambda name, factor: total.append(factor.sample_gram()), retain_graph=retain_graph
        )
    return torch.stack(total).sum(0)


def clipped_gradient(
    losses: Tensor, max_norm: float, *, params: Params, retain_graph: bool = True
) -> dict[str, Tensor]:
    r"""Sum of the samples' gradients, each clipped to a norm, from one backward.

    .. math:: \sum_i \min\Bigl(1, \frac{C}{\lVert g_i\rVert}\Bigr)\, g_i

    Args:
        losses, params, retain_graph: as in `per_sample_products`.
        max_norm: C > 0, of a sample's gradient over all parameters.

    Returns:
        name -> ``[*shape]``. No noise is added: this alone gives no differential privacy.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    check_losses(losses)
    number = isinstance(max_norm, (int, float)) and not isinstance(max_norm, bool)
    if not (number and math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"max_norm: expected a finite number > 0, got {max_norm!r}.")
    factors: dict[str, PerSampleGrad] = {}

    def use(name: str, factor: PerSampleGrad) -> None:
        factors[name] = factor.computed()

    with torch.no_grad():
        tape_of(params).resolve(losses).collect(use, retain_graph=retain_graph)
        norm = torch.stack([factor.norms() for factor in factors.values()]).sum(0).sqrt()
        weights = (max_norm / norm).clamp(max=1)  # of a gradient of 0 the weight is 1
        return {name: weighted_sum(factor, weights) for name, factor in factors.items()}


class GradientNoise(NamedTuple):
    r"""Noise of the mean gradient of each domain, unbiased; ``[D]`` each.

    Attributes:
        trace: :math:`\operatorname{tr}\Sigma_d`, the variance of a sample's gradient, summed over
            its entries; NaN for a domain with fewer than two samples.
        square: :math:`\lVert G_d\rVert^2` of the expected gradient. A negative one, with a negative
            scale, means that the samples are too few to tell the gradient from zero.
        scale: trace / square, the simple noise scale: the batch size at which noise and gradient
            are as large.
    """

    trace: Tensor
    square: Tensor
    scale: Tensor


def gradient_noise(
    losses: Tensor,
    domains: Tensor,
    *,
    params: Params,
    num_domains: int | None = None,
    retain_graph: bool = True,
) -> GradientNoise:
    r"""Gradient noise scale of each domain, from one backward.

    .. math::
        \operatorname{tr}\Sigma_d = \frac1{n_d-1}\sum_{i\in d}\lVert g_i - \bar g_d\rVert^2,
        \qquad
        \lVert G_d\rVert^2 = \lVert\bar g_d\rVert^2 - \operatorname{tr}\Sigma_d / n_d

    Args:
        losses, params, retain_graph: as in `per_sample_products`.
        domains: domain of each sample ``[N]``, integer; zeros for the noise of the whole batch.
        num_domains: D; default one more than the largest id.

    It forms the domains' means and variances of one parameter at a time.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        McCandlish, Kaplan, Amodei, OpenAI Dota Team: An Empirical Model of Large-Batch Training,
        2018.
    """
    check_losses(losses)
    parts = partition(domains, losses, num_domains)
    found: list[tuple[Tensor, Tensor]] = []

    def use(name: str, factor: PerSampleGrad) -> None:  # centred, so that a trace is not negative
        mean, variance = (x.reshape(len(x), -1) for x in factor.moments(parts))
        found.append((mean.square().sum(1), variance.sum(1)))

    with torch.no_grad():
        tape_of(params).resolve(losses).collect(use, retain_graph=retain_graph)
        mean, variance = (torch.stack(of).sum(0) for of in zip(*found, strict=True))
        count = parts.count.to(mean.dtype)
        trace = variance * (count / (count - 1).where(count > 1, torch.nan))
        expected = mean - trace / count
        return GradientNoise(trace, expected, trace / expected)
