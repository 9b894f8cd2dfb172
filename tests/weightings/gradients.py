"""Sets of gradients to weigh, of several kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows(domains: int, seed: int, kind: str = "plain") -> Tensor:
    """Gradients: some that agree, of all lengths, one twice, or more than there are directions."""
    generator = torch.Generator().manual_seed(1000 * domains + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    g = normal(domains, 3 if kind == "flat" else 40)
    if kind == "agreeing":
        g = 0.5 * g + normal(1, 40)
    elif kind == "lengths":
        g = g * torch.exp(2 * normal(domains, 1))
    elif kind == "twice":
        g[-1] = g[0]
    return g


def gram(g: Tensor) -> Tensor:
    return g @ g.t()


def close(a: Tensor, b: Any, within: float = 1e-9) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=within, atol=within)


def direction(weighting: Any, g: Tensor) -> Tensor:
    """What a weighting makes of gradients of largest length 1."""
    g = g / g.norm(dim=1).max()
    return weighting(gram(g)) @ g
