"""Gradients through fused attention: those of plain attention, which autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOMAINS
from penalties import gradients_of, penalty_of, per_sample, third
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdg.gradients.derivatives import OWN
from fastdg.gradients.graph import Graph

N = len(DOMAINS)
FUSED, PLAIN = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.7)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A mask that is one of numbers is of the dtype of the queries."""
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


PADDING = torch.arange(5) <= torch.arange(N).view(N, 1, 1, 1) % 5  # of the last keys
ATTENTIONS: dict[str, Attend] = {
    "plain": F.scaled_dot_product_attention,
    "scale": scaled,
    "fewer keys": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3]),
    "frozen keys": lambda q, k, v: F.scaled_dot_product_attention(q, k.detach(), v),
    "frozen values": lambda q, k, v: F.scaled_dot_product_attention(q, k, v.detach()),
    "one tensor": lambda q, k, v: F.scaled_dot_product_attention(q, q, q),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "padded keys": lambda q, k, v: masked(q, k, v, PADDING),
    "biased": lambda q, k, v: masked(q, k, v, torch.linspace(-3, 3, 25).view(5, 5)),
    "queries without keys": lambda q, k, v: masked(q, k, v, torch.ones(5, 5).tril(-1).bool()),
    "grouped heads": grouped,
}


class Model(nn.Module):
    """Attention of two heads between layers."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.first, self.qkv, self.last = nn.Linear(3, 4), nn.Linear(4, 24), nn.Linear(8, 3)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        z = self.qkv(self.first(x).tanh()).unflatten(-1, (3, 2, 4))
        z = self.attend(*z.permute(2, 0, 3, 1, 4).unbind(0))
        z = self.last(z.transpose(1, 2).flatten(2).tanh()).mean(1)
        z = z.float() if z.dtype == torch.bfloat16 else z
        return F.cross_entropy(z, torch.arange(N) % 3, reduction="none")


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[Model, Tensor]:
    torch.manual_seed(5)
    return Model(ATTENTIONS[name]).to(dtype), torch.randn(N, 5, 3, dtype=dtype).requires_grad_()


def gradients(model: Model, x: Tensor, backend: SDPBackend, params: Any = None) -> list[Tensor]:
    with sdpa_kernel(backend):
        losses = model(x)
    return gradients_of(penalty_of(losses, params or model), [*model.parameters(), x])


@pytest.mark.parametrize("params", ["all", "first"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_same_as_plain_attention(name: str, params: str) -> None:
    model, x = made(name)
    tracked = None if params == "all" else {"first": model.first.weight}
    found = gradients(model, x, FUSED, tracked)
    torch.testing.assert_close(found, gradients(model, x, PLAIN, tracked))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_it_is_fused(name: str) -> None:
    model, x = made(name)
    with sdpa_kernel(FUSED):
        root = model(x).grad_fn
    assert root is not None
    assert {n.name() for n in Graph(root).nodes} & {k for k in OWN if k.startswith("Scaled")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision(dtype: torch.dtype) -> None:
    model, x = made("plain", dtype)
    found = gradients(model, x, FUSED)
    exact = gradients(model.double(), x.detach().double().requires_grad_(), PLAIN)
    assert {g.dtype for g in found} == {dtype}
    for one, two in zip(found, exact, strict=True):
        assert (one - two).norm() <= (0.1 if dtype == torch.bfloat16 else 1e-4) * two.norm() + 1e-3


def test_a_third_derivative_is_refused() -> None:
    model, x = made("plain")
    with sdpa_kernel(FUSED):
        rows = per_sample(model(x), model.first.bias)
    with pytest.raises(RuntimeError, match=r"has no derivative|not implemented"):
        third(rows, [model.first.weight], x)


def test_packed_tensors_are_refused() -> None:
    model, x = made("plain")
    with sdpa_kernel(FUSED), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        losses = model(x)
    with pytest.raises(RuntimeError, match=r"^create_graph: .*SDPBackend\.MATH"):
        penalty_of(losses, model)
