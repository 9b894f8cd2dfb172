"""Losses in functional form, and their gradients by one backward pass a sample in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

N, D = 7, 5
DOMAINS = torch.tensor([0, 2, 0, 2, 3, 0, 2])  # 1 and 4 are empty, 3 has a single sample
CHUNKS = [None, 1, 2, 3, N, 100]


# -- the truth --


class Case(NamedTuple):
    loss: Callable[..., Tensor]
    params: Any
    batch: tuple[Any, ...]
    names: list[str]

    @property
    def tensors(self) -> list[Tensor]:
        """What can be differentiated: the parameters, then what is floating in the batch."""
        rows = [x for x in pytree.tree_leaves(self.batch) if x.is_floating_point()]
        return [*pytree.tree_leaves(self.params), *rows]


def gradients(case: Case, create_graph: bool = False) -> dict[str, Tensor]:
    """name -> ``[N, *shape]``, one backward pass a sample."""
    leaves = pytree.tree_leaves(case.params)
    rows = []
    for i in range(N):
        sample = pytree.tree_map(lambda x, i=i: x[i], case.batch)
        loss = case.loss(case.params, *sample)
        rows.append(
            torch.autograd.grad(loss, leaves, create_graph=create_graph, materialize_grads=True)
        )
    return {
        name: torch.stack(g) for name, g in zip(case.names, zip(*rows, strict=True), strict=True)
    }


def moments(grads: Tensor) -> tuple[Tensor, Tensor]:
    means, variances = [], []
    for d in range(D):
        rows = grads[d == DOMAINS]
        mean = rows.sum(0) / max(1, len(rows))
        means.append(mean)
        variances.append((rows - mean).square().sum(0) / max(1, len(rows)))
    return torch.stack(means), torch.stack(variances)


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == expected.shape
    error = float((got.detach().double() - expected.detach().double()).norm())
    assert error <= tolerance * max(1.0, float(expected.detach().norm()))


# -- what it is tried on --


def of_module(dtype: torch.dtype = torch.float64) -> Case:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    params = dict(model.named_parameters())
    x = torch.randn(N, 5, dtype=dtype, requires_grad=True)
    return Case(loss, params, (x, torch.arange(N) % 3), list(params))


def bare() -> Case:
    """A function of tensors: a weight used twice, a scalar, one that is not used at all."""

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ params["w"])
        return params["scale"] * (torch.tanh(hidden @ params["w"]) - x).square().sum()

    shapes = {"w": (4, 4), "scale": (), "unused": (2, 3)}
    params = {n: torch.randn(s, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}
    return Case(loss, params, (torch.randn(N, 4).double().requires_grad_(),), list(shapes))


def nested() -> Case:
    """Parameters and batch in dicts, lists and tuples; samples of two ranks."""

    def loss(params: dict[str, Any], data: dict[str, Any]) -> Tensor:
        tokens, (weight, target) = data["tokens"], data["rest"]
        for w, b in params["layers"]:
            tokens = torch.tanh(tokens @ w + b)
        return weight * (tokens.mean(0) @ params["head"]["w"] - target).square().sum()

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    params = {"layers": [(tensor(3, 4), tensor(4)), (tensor(4, 4), tensor(4))]}
    params["head"] = {"w": tensor(4, 2)}
    batch = ({"tokens": tensor(N, 6, 3), "rest": (tensor(N), tensor(N, 2))},)
    names = [f"layers.{i}.{k}" for i in (0, 1) for k in (0, 1)]
    return Case(loss, params, batch, [*names, "head.w"])


CASES = [of_module, bare, nested]


def penalty(variance: dict[str, Tensor]) -> Tensor:
    """A scalar that tells every entry apart."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(variance):
        c = torch.rand(variance[name].shape, generator=generator, dtype=torch.float64)
        total = total + (c * variance[name]).sum() + (c * variance[name]).square().sum()
    return total
