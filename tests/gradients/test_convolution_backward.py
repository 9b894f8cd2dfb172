"""Gradients through a convolution's own backward: autograd's, without a kernel of a map's size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DOMAINS
from penalties import gradients_of, penalty_of, per_sample, third
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

N = len(DOMAINS)
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "2d": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "3d": lambda: nn.Conv3d(4, 2, 2),
    "no bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)),
    "dilation": lambda: nn.Conv2d(4, 6, 2, dilation=(2, 1), padding=1),
    "groups": lambda: nn.Conv2d(4, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "one by one": lambda: nn.Conv2d(4, 6, 1),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed, groups": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2),
    "channels last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "weight norm": lambda: weight_norm(nn.Conv2d(4, 6, 3)),
    "frozen": lambda: nn.Conv2d(4, 6, 3).requires_grad_(False),
    "frozen weight": lambda: frozen_weight(),
}


def frozen_weight() -> nn.Module:
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.requires_grad_(False)
    return layer


class Model(nn.Module):
    """The layer between two others, so that its input gradient is differentiated."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        dims = layer.weight.dim() - 2
        first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.first, self.layer = first(2, 4, 1), layer
        self.last = nn.Linear(layer.bias.numel() if layer.bias is not None else 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(self.first(x).tanh()).tanh()
        return F.cross_entropy(
            self.last(z.flatten(2).mean(2)), torch.arange(N) % 3, reduction="none"
        )


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[Model, Tensor]:
    torch.manual_seed(2)
    model = Model(CONVOLUTIONS[name]()).to(dtype)
    dims = model.first.weight.dim() - 2
    return model, torch.randn(N, 2, *(5, 4, 3)[:dims], dtype=dtype).requires_grad_()


def gradients(model: Model, x: Tensor, params: Any = None) -> list[Tensor]:
    leaves = [*(p for p in model.parameters() if p.requires_grad), x]
    return gradients_of(penalty_of(model(x), params or model), leaves)


@pytest.mark.filterwarnings("ignore:params:UserWarning")
@pytest.mark.parametrize("params", ["all", "first"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_same_as_autograd(name: str, params: str, autograd: Any) -> None:
    model, x = made(name)
    tracked = None if params == "all" else {"first": model.first.weight}
    wanted = autograd(lambda: gradients(model, x, tracked))
    torch.testing.assert_close(gradients(model, x, tracked), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision(dtype: torch.dtype) -> None:
    model, x = made("2d", dtype)
    found = gradients(model, x)
    exact = gradients(model.double(), x.detach().double().requires_grad_())
    assert {g.dtype for g in found} == {dtype}
    for one, two in zip(found, exact, strict=True):
        assert (one - two).norm() <= (0.1 if dtype == torch.bfloat16 else 1e-4) * two.norm() + 1e-3


class Sizes(TorchDispatchMode):
    """Counts convolutions by the size of their kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.found[tuple(args[1].shape[2:])] += 1
        return func(*args, **(kwargs or {}))


def test_no_kernel_of_the_size_of_the_maps(autograd: Any) -> None:
    model, x = made("2d")

    def kernels() -> Counter[tuple[int, ...]]:
        loss = penalty_of(model(x), model)
        with Sizes() as sizes:
            loss.backward()
        return sizes.found

    assert set(kernels()) == {(3, 3)}
    assert (5, 4) in autograd(kernels)


@pytest.mark.parametrize("name", ["2d", "stride", "transposed, groups", "groups"])
def test_derivatives_of_every_order(name: str) -> None:
    model, x = made(name)
    leaves = [*model.first.parameters(), *model.layer.parameters(), model.last.weight]

    rows = [torch.autograd.grad(row, model.first.bias, create_graph=True)[0] for row in model(x)]
    found = third(per_sample(model(x), model.first.bias), leaves, x)
    torch.testing.assert_close(found, third(torch.stack(rows), leaves, x))
