"""Norms: what their rules read, and what only a GPU has."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import DOMAINS, NUM_DOMAINS
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg
from fastdg import ops
from fastdg.gradients.rules import registry as rules

N = 6


def test_an_rms_norm_that_is_one_operation() -> None:
    """As on a GPU; a CPU's is written out in others."""
    x, delta, weight = torch.randn(N, 3, 4), torch.randn(N, 3, 4), torch.ones(4).requires_grad_()
    node = SimpleNamespace(
        name=lambda: "FusedRmsNormBackward0",
        _saved_input=x,
        _saved_result1=(x.square().mean(2, keepdim=True) + 0.1).rsqrt(),
        _saved_normalized_shape=(4,),
    )
    owner = torch.arange(N).view(N, 1, 1)
    rule = rules.rule_for(rules.Use(node, 1, (), (4,), owner, (N, 3, 4), N, (4,)))  # type: ignore[arg-type]
    assert rule is not None
    found = rule.factor(node, rule.saved(node), delta).per_sample()  # type: ignore[arg-type]
    for row, own, up in zip(found, x, delta, strict=True):
        normal = F.rms_norm(own, (4,), weight, 0.1)
        torch.testing.assert_close(row, torch.autograd.grad(normal, weight, up)[0])


NORMS: dict[str, Callable[..., Tensor]] = {
    "layer norm": lambda x, w, b: F.layer_norm(x.movedim(1, -1), (8,), w, b).movedim(-1, 1),
    "group norm": lambda x, w, b: F.group_norm(x, 2, w, b),
    "batch norm": lambda x, w, b: F.batch_norm(x, torch.zeros(8), torch.ones(8), w, b),
}


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_weight_and_bias_of_a_norm_take_one_read(
    name: str, create_graph: bool, order: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the input as it lies."""
    calls, inputs, run = [], [], ops.norm_gradients

    def counted(x: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        calls.append(x)
        return run(x, *args, **more)

    def norm(x: Tensor, *w: Tensor) -> Tensor:
        x = x.view(N, 8, 3, 5).contiguous(memory_format=order)
        inputs.append(x)
        return NORMS[name](x, *w).square()

    monkeypatch.setattr(ops, "norm_gradients", counted)
    model = nn.Linear(4, 120)
    w = [nn.Parameter(torch.rand(8)) for _ in range(2)]
    losses = norm(model(torch.randn(N, 4)), *w).flatten(1).sum(1)
    named = {"weight": w[0], "bias": w[1]}
    fastdg.domain_moments(
        losses, DOMAINS, params=named, num_domains=NUM_DOMAINS, create_graph=create_graph
    )
    assert len(calls) == 1
    copied = name == "layer norm" and order is torch.contiguous_format  # by torch's own forward
    assert copied or calls[0].data_ptr() == inputs[0].data_ptr()


@pytest.mark.parametrize("name", NORMS)
def test_norms_that_wait_are_those_computed_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; a norm that is used twice, too."""
    w = [nn.Parameter(torch.rand(8)) for _ in range(4)]
    x, model = torch.randn(N, 4), nn.Linear(4, 120)
    named = {str(k): p for k, p in enumerate(w)}

    def results() -> list[Any]:
        h = NORMS[name](model(x).view(N, 8, 3, 5), *w[:2]).sin()
        h = NORMS[name](NORMS[name](h, *w[2:]).sin(), *w[2:])
        losses = h.square().flatten(1).sum(1)
        more = {"params": named, "retain_graph": True}
        moments = fastdg.domain_moments(losses, DOMAINS, num_domains=NUM_DOMAINS, **more)
        clipped = fastdg.clipped_gradient(losses, 0.5, **more)
        return [moments.mean, moments.variance, clipped]

    expected = results()
    monkeypatch.setattr(Tensor, "is_cpu", False)
    torch.testing.assert_close(results(), expected)
