"""Small quadratic problems with weights that are not negative.

The answer is closed once it is known which weights are positive, the support. All supports are
tried at once for few domains; for more, the supports that an interior point proposes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import stops

ENUMERATED = 6  # domains whose 2^D supports are all tried
SYSTEMS = 1024  # supports of all problems together up to which every count of weights is tried
NEAR = 6  # beyond, counts so near the interior point's: each projection's own support is clear
ROUNDS = 40  # about 20 suffice


def every_support(domains: int, device: torch.device) -> Tensor:
    """All sets of domains, ``[2^D, D]`` bool; the first one is empty."""
    number, place = torch.arange(2**domains, device=device), torch.arange(domains, device=device)
    return (number.unsqueeze(1) >> place) % 2 == 1


def nested_supports(weights: Tensor, slack: Tensor) -> Tensor:
    """For weights ``[*, D]`` near the solution: no domain, and the k that are positive most
    clearly, for each k up to D, ``[*, M, D]`` bool; of many problems for each k near the number of
    weights above their multipliers. ``slack`` is the multiplier of each weight's own bound."""
    ratio, domains = weights / slack, weights.shape[-1]
    place = ratio.argsort(-1, descending=True).argsort(-1)
    counts = torch.arange(domains + 1, device=weights.device)
    if weights.numel() > SYSTEMS:
        positive = (ratio > 1).sum(-1, keepdim=True)
        near = torch.arange(-NEAR, NEAR + 1, device=weights.device) + positive
        counts = torch.cat([torch.zeros_like(positive), near.clamp(1, domains)], -1)
    return place.unsqueeze(-2) < counts.unsqueeze(-1)


def proposed(matrix: Tensor, linear: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Supports ``[*, M, D]``, the first of them empty, and solutions that are nearly exact, if
    any, ``[*, 0 or 1, D]``: where gradients depend on each other these may be all there is.
    Arguments as of `interior_point`."""
    if len(matrix) <= ENUMERATED:
        return every_support(len(matrix), matrix.device), linear.unsqueeze(-2)[..., :0, :]
    y, slack = interior_point(matrix, linear, sums)
    return nested_supports(y, slack), y.unsqueeze(-2)


def on_supports(matrix: Tensor, right: Tensor, supports: Tensor) -> Tensor:
    """Solve ``matrix y = right`` on each support, with zeros elsewhere.

    Args:
        matrix: ``[D, D]``.
        right: ``[*, D, R]``, R right-hand sides.
        supports: ``[*, D]`` bool.
    """
    both = supports.unsqueeze(-1) & supports.unsqueeze(-2)
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    found, _ = torch.linalg.solve_ex(matrix.where(both, eye), right * supports.unsqueeze(-1))
    return found


def to_simplex(weights: Tensor, supports: Tensor) -> Tensor:
    """Clamp weights ``[M, D]`` at 0 and divide by their sum; equal weights where the sum is 0."""
    positive = weights.clamp(min=0)
    total = positive.sum(-1, keepdim=True)
    good = (total > 0) & total.isfinite()
    even = supports / supports.sum(-1, keepdim=True)
    return torch.where(good, positive / total.where(good, 1.0), even.to(positive.dtype))


def least(candidates: Tensor, values: Tensor) -> Tensor:
    """The candidate ``[*, M, D]`` with the smallest of the values ``[*, M]``, ``[*, D]``."""
    best = values.where(values.isfinite(), torch.inf).argmin(-1)
    index = best[..., None, None].expand(*best.shape, 1, candidates.shape[-1])
    return candidates.gather(-2, index).squeeze(-2)


def nonnegative(matrix: Tensor, right: Tensor) -> Tensor:
    r"""Minimise :math:`\tfrac12 y^\top A y - q^\top y` over :math:`y \ge 0`.

    Args:
        matrix: A ``[D, D]``, positive definite.
        right: q ``[R, D]``, R problems.

    Returns:
        y ``[R, D]``.
    """
    rows = right.unsqueeze(-2)
    supports, near = proposed(matrix, -right, None)
    made = on_supports(matrix, rows.unsqueeze(-1), supports).squeeze(-1).clamp(min=0)
    made = torch.cat([made, near], -2)
    return least(made, ((made @ matrix / 2 - rows) * made).sum(-1))


def interior_point(matrix: Tensor, linear: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Minimise :math:`\tfrac12 y^\top A y + l^\top y` over :math:`y \ge 0` by a primal-dual
    interior-point method, to about 1e-13.

    Args:
        matrix: A ``[D, D]``, positive semidefinite.
        linear: l ``[*, D]``, a problem in each row.
        sums: a ``[D]``, positive, of a further condition :math:`a^\top y = 1`.

    Returns:
        y, and the multipliers of its bounds, ``[*, D]``; both positive.
    """
    ones = torch.ones_like(linear)
    a = ones if sums is None else sums.expand_as(ones)
    y, slack = ones if sums is None else ones / a.sum(-1, keepdim=True), ones
    for _ in range(ROUNDS):
        target = 0.1 * (y * slack).mean(-1, keepdim=True)
        right = torch.stack([target / y - y @ matrix - linear, a], -1)
        system = matrix + torch.diag_embed(slack / y)
        step, along = torch.linalg.solve_ex(system, right)[0].unbind(-1)
        if sums is not None:
            rest = 1 - (a * (y + step)).sum(-1, keepdim=True)
            step = step + rest / (a * along).sum(-1, keepdim=True) * along
        change = target / y - slack - slack / y * step
        ratios = torch.cat([-step / y, -change / slack], -1).amax(-1, keepdim=True)
        rate = (0.99 / ratios.clamp(min=1e-300)).clamp(max=1)
        y, slack = y + rate * step, slack + rate * change
        if stops((target < 1e-15).all()):
            break
    return y, slack
