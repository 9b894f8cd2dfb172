"""Which sample a row belongs to is found whatever the size of the gradients, or is left open."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from on_device import DEVICE
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg


class SequenceFirst(nn.Module):
    """Samples in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.transpose(0, 1)).tanh()).mean(0)


def case(samples: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(samples, 5, 4), torch.arange(samples) % 3
    return SequenceFirst(), x, y


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def relative(model: nn.Module, losses: Tensor, scale: float) -> float:
    """Error of the per-sample gradients, each against autograd's own in float64."""
    _, x, y = case(len(losses))
    parameters = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fastdg.per_sample_gradients(losses, params=model)
    double = SequenceFirst().double()
    double.load_state_dict(model.state_dict())
    expected = [
        torch.autograd.grad(one * scale, list(double.parameters()), retain_graph=True)
        for one in losses_of(double, x.double(), y)
    ]
    off = norm = 0.0
    for k, name in enumerate(dict(model.named_parameters())):
        rows = torch.stack([grads[k] for grads in expected])
        off += float((found[name].double() - rows).square().sum())
        norm += float(rows.square().sum())
    assert len(found) == len(parameters)
    return math.sqrt(off / norm)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
def test_float32(scale: float) -> None:
    model, x, y = case()
    assert relative(model, losses_of(model, x, y) * scale, scale) < 1e-5


@pytest.mark.parametrize("samples", [6, 40])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e2])
def test_float16(scale: float, samples: int) -> None:
    model, x, y = case(samples)
    with torch.autocast(DEVICE, torch.float16):
        losses = losses_of(model, x, y)
    assert relative(model, losses * scale, scale) < 1e-2


def test_one_sample_far_below_the_others() -> None:
    model, x, y = case()
    shares = torch.ones(6)
    shares[4] = 1e-36
    losses = losses_of(model, x, y) * shares
    found = fastdg.per_sample_gradients(losses, params=model)
    parameters = dict(model.named_parameters())
    for i in range(6):
        grads = torch.autograd.grad(losses[i], list(parameters.values()), retain_graph=True)
        for name, grad in zip(parameters, grads, strict=True):
            torch.testing.assert_close(found[name][i], grad, rtol=1e-4, atol=1e-6)


def test_losses_that_are_not_numbers_say_nothing_of_the_next() -> None:
    model, x, y = case(5)  # as many samples as positions: either may come first
    fastdg.per_sample_norms(losses_of(model, x * math.nan, y), params=model)
    for scale in (0.0, 1.0):
        losses = losses_of(model, x, y) * scale
        found = fastdg.per_sample_gradients(losses, params=model)
        for i in range(5):
            (grad,) = torch.autograd.grad(losses[i], [model.body.weight], retain_graph=True)
            torch.testing.assert_close(found["body.weight"][i], grad)
