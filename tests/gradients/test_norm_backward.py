"""Gradients through a norm's own backward: autograd's, in far fewer operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from oracle import DOMAINS
from penalties import gradients_of, penalty_of, per_sample, third
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdg
from fastdg.gradients import engine
from fastdg.gradients.derivatives import NormBackward
from fastdg.gradients.graph import Graph, output_shapes

N = len(DOMAINS)
Y = torch.arange(N) % 3
HALVES = (torch.bfloat16, torch.float16)


class Move(nn.Module):
    """A module of a function."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def frozen(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels).eval()
    norm.running_mean = torch.randn(channels)
    norm.running_var = torch.rand(channels) + 0.5
    return norm


def maps(norm: Callable[[], nn.Module], last: bool = False) -> nn.Module:
    order = torch.channels_last if last else torch.contiguous_format
    layers = [Move(lambda x: x.contiguous(memory_format=order)), nn.Conv2d(2, 8, 3), norm()]
    layers += [nn.Tanh(), nn.Conv2d(8, 8, 2), norm(), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 3))


def tokens(norm: Callable[[], nn.Module], first: bool = False) -> nn.Module:
    move = (lambda x: x.flatten(2).permute(2, 0, 1)) if first else (lambda x: x.flatten(2).mT)
    layers = [nn.Conv2d(2, 8, 3), Move(move), norm(), nn.Linear(8, 8), nn.Tanh(), norm()]
    mean = Move(lambda x: x.tanh().mean(0 if first else 1))
    return nn.Sequential(*layers, mean, nn.Linear(8, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: maps(lambda: nn.GroupNorm(2, 8)),
    "group, channels last": lambda: maps(lambda: nn.GroupNorm(4, 8), last=True),
    "one group, channels last": lambda: maps(lambda: nn.GroupNorm(1, 8), last=True),
    "group, no weight": lambda: maps(lambda: nn.GroupNorm(2, 8, affine=False)),
    "batch, eval": lambda: maps(lambda: frozen(8)),
    "batch, training": lambda: maps(lambda: nn.BatchNorm2d(8)),
    "layer": lambda: tokens(lambda: nn.LayerNorm(8)),
    "layer, no bias": lambda: tokens(lambda: nn.LayerNorm(8, bias=False)),
    "layer, no weight": lambda: tokens(lambda: nn.LayerNorm(8, elementwise_affine=False)),
    "layer, tokens first": lambda: tokens(lambda: nn.LayerNorm(8), first=True),
    "layer, two dimensions": lambda: tokens(lambda: nn.LayerNorm((9, 8))),
    "rms": lambda: tokens(lambda: nn.RMSNorm(8)),
}


def norms(model: nn.Module) -> dict[str, nn.Module]:
    kinds = nn.GroupNorm, nn.LayerNorm, nn.BatchNorm2d, nn.RMSNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = MODELS[name]().to(dtype)
    for norm in norms(model).values():
        for p in norm.parameters():
            nn.init.uniform_(p, 0.5, 1.5)
    return model, torch.randn(N, 2, 5, 5, dtype=dtype).requires_grad_()


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    z = model(x)
    return F.cross_entropy(z.float() if x.dtype in HALVES else z, Y, reduction="none")


def gradients(model: nn.Module, x: Tensor, params: object = None) -> list[Tensor]:
    leaves = [*(p for p in model.parameters() if p.requires_grad), x]
    return gradients_of(penalty_of(losses_of(model, x), params or model), leaves)


Autograd = Callable[[Callable[[], list[Tensor]]], list[Tensor]]


@pytest.mark.filterwarnings("ignore:params:UserWarning")
@pytest.mark.parametrize("kept", ["all", "no norm", "no gain", "a layer", "a norm's bias"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_autograd(name: str, kept: str, autograd: Autograd) -> None:
    model, x = made(name)
    for norm in norms(model).values():
        for key, p in norm.named_parameters():
            p.requires_grad_(kept != "no norm" and (kept != "no gain" or key == "bias"))
    params: Mapping[str, Tensor] | None = None
    first = next(p for p in model.parameters() if p.dim() == 4)
    if kept == "a layer":
        params = {"first": first}
    elif kept == "a norm's bias":
        biases = {
            k: p for k, n in norms(model).items() if (p := getattr(n, "bias", None)) is not None
        }
        params = {"first": first} | biases
    wanted = autograd(lambda: gradients(model, x, params))
    torch.testing.assert_close(gradients(model, x, params), wanted)


@pytest.mark.parametrize("name", ["group", "layer", "batch, eval"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, x = made(name, dtype)
    found = gradients(model, x)
    exact = gradients(model.double(), x.detach().double().requires_grad_())
    assert {g.dtype for g in found} == {dtype}
    for one, two in zip(found, exact, strict=True):
        assert (one - two).norm() <= 0.1 * two.norm() + 1e-3


@pytest.mark.parametrize("name", ["group", "layer", "batch, eval"])
def test_no_product_of_the_size_of_the_input(name: str) -> None:
    """In the graph of the penalty; nor does a norm's result need the gradient of its statistics."""
    model, x = made(name)
    root = penalty_of(losses_of(model, x), model).grad_fn
    assert root is not None
    sizes = {N * 8 * 4, N * 8 * 9}
    nodes = [n for n in Graph(root).nodes if not sizes.isdisjoint(map(numel, output_shapes(n)))]
    names = [node.name() for node in nodes]
    assert not [n for n in names if n.startswith(("Mul", "Sub", "NativeLayerNormBackwardBack"))]
    assert names.count("_DerivativeBackward") == len(norms(model))


def numel(shape: tuple[int, ...] | None) -> int:
    return -1 if shape is None else torch.Size(shape).numel()


@pytest.mark.parametrize("name", ["group", "group, channels last", "batch, eval"])
def test_derivatives_of_every_order(name: str) -> None:
    model, x = made(name)
    leaves = list(model.parameters())[:-1]

    losses = F.cross_entropy(model(x), Y, reduction="none")
    rows = [torch.autograd.grad(row, model[1].bias, create_graph=True)[0] for row in losses]
    found = third(per_sample(losses_of(model, x), model[1].bias), leaves, x)
    torch.testing.assert_close(found, third(torch.stack(rows), leaves, x))


def test_gradients_of_further_tensors(autograd: Autograd) -> None:
    """The same backward makes the ordinary gradients of a norm's weight and bias."""
    model, x = made("group")

    def run() -> list[Tensor]:
        losses = F.cross_entropy(model(x), Y, reduction="none")
        forward = engine.plan_gradients(losses, {"bias": model[1].bias})
        extra = [model[5].weight, model[5].bias, model[4].weight, model[4].bias, model[2].weight]
        sums = engine.collect(forward, lambda name, g: None, create_graph=True, extra=extra)
        loss = sum((g.square().sum() for g in sums if g is not None), torch.zeros(()))
        return [*(g for g in sums if g is not None), *torch.autograd.grad(loss, [*extra, x])]

    torch.testing.assert_close(run(), autograd(run))


def test_a_hook_on_the_norm_sees_and_changes_the_gradient(autograd: Autograd) -> None:
    model, x = made("layer")
    seen: list[bool] = []

    def run() -> list[Tensor]:
        def hook(module: nn.Module, args: object, out: Tensor) -> None:
            assert out.grad_fn is not None
            out.grad_fn.register_hook(lambda found, grads: change(found))

        def change(found: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
            if found[0] is None:
                return None
            seen.append(torch.is_grad_enabled() == found[0].requires_grad)
            return found[0].sin(), *found[1:]

        handle = model[5].register_forward_hook(hook)
        try:
            return gradients(model, x)
        finally:
            handle.remove()

    torch.testing.assert_close(run(), autograd(run))
    assert seen and all(seen)


@pytest.mark.parametrize("packed", ["checkpoint", "hooks"])
def test_tensors_that_are_packed(packed: str, autograd: Autograd) -> None:
    model, x = made("group")
    first, second = model[:4], model[4:]

    def forward() -> Tensor:
        if packed == "checkpoint":
            return second(checkpoint(first, x, use_reentrant=False))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):
            return second(first(x))

    def run() -> list[Tensor]:
        losses = F.cross_entropy(forward(), Y, reduction="none")
        moments = fastdg.domain_moments(losses, DOMAINS, params=model, create_graph=True)
        total = sum((v.square().sum() for v in moments.variance.values()), torch.zeros(()))
        return list(torch.autograd.grad(total, list(model.parameters())[:-1]))

    torch.testing.assert_close(run(), autograd(run))


def test_an_error_in_the_norm_leaves_grad_mode_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: NormBackward, *args: object) -> None:
        raise ArithmeticError("no")

    monkeypatch.setattr(NormBackward, "_after", fail)
    model, x = made("group")
    with pytest.raises(ArithmeticError):
        penalty_of(losses_of(model, x), model)
    assert torch.is_grad_enabled()
