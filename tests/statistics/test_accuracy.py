"""fp32 statistics against float64, parameter by parameter, on every backend that is here."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdg

N, D = 24, 3
BACKENDS = [name for name, (available, _) in fastdg.backends().items() if available]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.block = nn.TransformerEncoderLayer(
            32, 4, 64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.patch(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(768, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    ),
    "CNN": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32).eval(), nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 64, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ),
    "transformer": Transformer,
}  # fmt: skip


def statistics(
    model: nn.Module, x: Tensor, y: Tensor, domains: Tensor
) -> dict[str, dict[str, Tensor]]:
    with sdpa_kernel(SDPBackend.MATH), fastdg.record(model) as tape:
        losses = F.cross_entropy(model(x), y, reduction="none")
    plain = fastdg.domain_moments(tape, losses, domains)
    moments = fastdg.domain_moments(tape, losses, domains, create_graph=True)
    penalty = torch.stack([(v - v.mean(0)).square().mean() for v in moments.variance.values()])
    grads = torch.autograd.grad(penalty.sum(), list(model.parameters()), retain_graph=True)
    names = [name for name, _ in model.named_parameters()]
    return {
        "mean": plain.mean,
        "variance": plain.variance,
        "differentiable variance": {n: v.detach() for n, v in moments.variance.items()},
        "derivative": dict(zip(names, grads, strict=True)),
        "gradient": fastdg.domain_gradients(tape, losses, domains),
        "norms": {"all": fastdg.per_sample_norms(tape, losses)},
        "gram": {"all": fastdg.domain_gram(tape, losses, domains)},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_single_precision(make: Callable[[], nn.Module], backend: str) -> None:
    model = make()
    x, y = torch.randn(N, 3, 16, 16) + 0.5, torch.randint(0, 10, (N,))
    domains = torch.randint(0, D, (N,))
    with fastdg.use_backend(backend):
        got = statistics(model, x, y, domains)
    with fastdg.use_backend("reference"):
        exact = statistics(model.double(), x.double(), y, domains)
    for kind, by_name in exact.items():
        largest = max(float(value.norm()) for value in by_name.values())
        for name, value in by_name.items():
            error = float((got[kind][name].double() - value).norm())
            # An attention's key bias has no gradient but rounding: nothing to be relative to
            size = max(float(value.norm()), 1e-6 * largest)
            limit = 1e-4 if kind == "derivative" else 1e-5
            assert error <= limit * size, f"{kind} of {name}: {error / size:.1e}"
            if "variance" in kind:
                assert bool((got[kind][name] >= 0).all())


@pytest.mark.parametrize("kind", ["node by node", "mixed samples", "by a rule"])
def test_a_float64_model_beside_a_float32_default(kind: str) -> None:
    """Counts are integers: a share made of them alone would have the default dtype's precision."""
    assert torch.get_default_dtype() == torch.float32
    x, domains = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 2, 0, 1, 2, 0])
    if kind == "node by node":
        model: nn.Module = nn.EmbeddingBag(7, 3, mode="max")
        given = torch.arange(30).view(6, 5) % 7
    else:
        norm = nn.BatchNorm1d(3) if kind == "mixed samples" else nn.LayerNorm(3)
        model, given = nn.Sequential(nn.Linear(4, 3), norm, nn.Tanh()), x
    losses = (model.double()(given) * x[:, :3]).sum(1)
    named = dict(model.named_parameters())
    rows = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "params: .* take one call of autograd", UserWarning)
        moments = fastdg.domain_moments(losses, domains, params=model)
    for name, of_one in zip(named, zip(*rows, strict=True), strict=True):
        g = torch.stack(of_one)
        for d in range(D):
            mean, variance = g[domains == d].mean(0), g[domains == d].var(0, correction=0)
            torch.testing.assert_close(moments.mean[name][d], mean, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(moments.variance[name][d], variance, rtol=1e-12, atol=1e-14)
