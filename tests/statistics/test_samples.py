"""Products, clipped sums and noise of single samples' gradients, against the gradients in full."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdg

N = 7


class Sequence(nn.Module):
    """A table, a linear layer that each sample uses five times, a norm, and a tied use."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(torch.tanh(self.body(self.table(x))))
        return self.head(self.norm(h).mean(1))


def images() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten()
    )
    return nn.Sequential(*net, nn.Linear(64, 3)), torch.randn(N, 2, 5, 5)


def mixed() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    return net, torch.randn(N, 4)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        torch.randn(N, 4),
    ),
    "images": images,
    "tokens": lambda: (Sequence(), torch.randint(9, (N, 5))),
    "mixed samples": mixed,
}
pytestmark = pytest.mark.filterwarnings("ignore:params. .*:UserWarning")


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.double()
    x = x.double() if x.is_floating_point() else x
    return model, F.cross_entropy(model(x), torch.arange(N) % 3, reduction="none")


def full(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """Each sample's gradient, by a backward of its own."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return {name: torch.stack(grads) for name, *grads in zip(names, *rows, strict=True)}


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


@pytest.mark.parametrize("name", MODELS)
def test_products_and_gram(name: str) -> None:
    model, losses = made(name)
    grads = full(model, losses)
    domains = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    directions = fastdg.domain_gradients(losses, domains, params=model)
    expected = flat(grads) @ flat(directions).t()
    found = fastdg.per_sample_products(losses, directions, params=model)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gram = fastdg.per_sample_gram(losses, params=model)
    torch.testing.assert_close(gram, flat(grads) @ flat(grads).t(), rtol=1e-10, atol=1e-12)
    first = next(iter(directions))
    some = fastdg.per_sample_products(losses, {first: directions[first]}, params=model)
    part = grads[first].flatten(1) @ directions[first].flatten(1).t()
    torch.testing.assert_close(some, part, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_clipped_gradient(name: str) -> None:
    model, losses = made(name)
    grads = full(model, losses)
    norm = flat(grads).norm(dim=1)
    limit = float(norm.median())
    weights = (limit / norm).clamp(max=1)
    found = fastdg.clipped_gradient(losses, limit, params=model)
    assert found.keys() == grads.keys()
    for key, value in found.items():
        expected = torch.einsum("n,n...->...", weights, grads[key])
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_noise(name: str) -> None:
    model, losses = made(name)
    grads = flat(full(model, losses))
    domains = torch.tensor([0, 0, 2, 2, 2, 3, 0])  # domain 1 is absent, 3 has one sample
    found = fastdg.gradient_noise(losses, domains, params=model)
    for d in (0, 2):
        rows = grads[domains == d]
        trace = rows.var(0).sum()
        square = rows.mean(0).square().sum() - trace / len(rows)
        torch.testing.assert_close(found.trace[d], trace, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.square[d], square, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.scale[d], trace / square, rtol=1e-8, atol=1e-12)
    assert found.trace[1].isnan() and found.trace[3].isnan()


def test_little_noise_of_large_gradients_is_kept_in_float32() -> None:
    x = 30 * torch.randn(1, 50) + 0.01 * torch.randn(16, 50)
    model = nn.Linear(50, 30)

    def noise(dtype: torch.dtype) -> Tensor:
        own = copy.deepcopy(model).to(dtype)
        losses, zeros = own(x.to(dtype)).square().sum(1), torch.zeros(16, dtype=torch.int64)
        return fastdg.gradient_noise(losses, zeros, params=own).trace.double()

    torch.testing.assert_close(noise(torch.float32), noise(torch.float64), rtol=1e-2, atol=0)


def test_a_gradient_of_zero_is_not_clipped() -> None:
    model = nn.Linear(3, 1).double()
    losses = (model(torch.randn(4, 3, dtype=torch.float64)).squeeze(1)) * torch.tensor([0, 1, 1, 1])
    found = fastdg.clipped_gradient(losses, 0.5, params=model)
    assert all(value.isfinite().all() for value in found.values())


def test_no_sample_of_a_linear_layer_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, losses = made("linear")
    directions = {"0.weight": torch.randn(2, 5, 4).double()}
    monkeypatch.setattr(fastdg.Outer, "per_sample", lambda self: pytest.fail("formed"))
    fastdg.per_sample_products(losses, directions, params=model)
    fastdg.per_sample_gram(losses, params=model)


def test_bad_input_is_told() -> None:
    model, losses = made("linear")
    with pytest.raises(ValueError, match=r"^directions: expected tensors .* sizes \[2, 3\]"):
        wrong = {"0.weight": torch.zeros(2, 5, 4), "0.bias": torch.zeros(3, 5)}
        fastdg.per_sample_products(losses, wrong, params=model)
    with pytest.raises(ValueError, match=r"^directions: expected \(K, \*\(5, 4\)\) for 0\.weight"):
        fastdg.per_sample_products(losses, {"0.weight": torch.zeros(2, 4, 5)}, params=model)
    with pytest.raises(ValueError, match=r"^directions: none of \['weight'\]"):
        fastdg.per_sample_products(losses, {"weight": torch.zeros(2, 5, 4)}, params=model)
    with pytest.raises(ValueError, match=r"^max_norm: expected a finite number > 0, got 0"):
        fastdg.clipped_gradient(losses, 0, params=model)
    with pytest.raises(ValueError, match=r"^losses: "):
        fastdg.gradient_noise(losses.mean(), torch.zeros(N), params=model)
