"""MIRO: samples and channels of a map, where all sizes coincide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from definitions import close
from on_device import DEVICE
from torch import Tensor, nn
from torch.optim import SGD

import fastdg

S = 4  # samples, tokens, channels, height and width
NC, NLC, LNC = (0, 1), (0, 2), (1, 2)


class Layer(nn.Module):
    def __init__(self, run: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.run, self.parts = run, nn.ModuleList(parts)
        self.weight = nn.Parameter(torch.randn(S, S) / 2)

    def forward(self, x: Tensor) -> Any:
        return self.run(x, self.weight, *self.parts)


class Model(nn.Module):
    """One layer; the logits are the map's means over each sample."""

    def __init__(self, sample: int, run: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.sample, self.layer = sample, Layer(run, *parts)
        self.head = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        while not isinstance(out, Tensor):
            out = next(iter(out.values())) if isinstance(out, dict) else out[0]
        return self.head(out.transpose(0, self.sample).flatten(1).mean(1, keepdim=True))


def conv2d() -> nn.Module:
    return nn.Conv2d(S, S, 3, padding=1)


def linear() -> nn.Module:
    return nn.Linear(S, S)


def windows(x: Tensor, w: Tensor, layer: nn.Module) -> Tensor:
    """A linear layer in 2x2 windows, which are folded into the samples (Swin)."""
    N, H, W, C = x.shape
    x = x.view(N, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, C)
    x = layer(x).view(-1, H // 2, W // 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(N, H, W, C)


def heads(x: Tensor, w: Tensor, qkv: nn.Module) -> Tensor:
    """Attention of two heads, (N, T, C)."""
    N, T, C = x.shape
    q, k, v = qkv(x).reshape(N, T, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(N, T, C)


def shuffle(x: Tensor, w: Tensor, layer: nn.Module) -> Tensor:
    return layer(x).view(S, 2, 2, S, S).transpose(1, 2).flatten(1, 2)


def mixer(x: Tensor, w: Tensor, *layers: nn.Module) -> Tensor:
    """Channels mixed, then tokens; what tells them apart is the sum."""
    x = layers[0](x)
    return x + layers[1](x.transpose(1, 2)).transpose(1, 2)


def excited(x: Tensor, w: Tensor, *layers: nn.Module) -> Tensor:
    """Squeeze and excitation, by a convolution along the channels."""
    x = layers[0](x)
    return x * layers[1](x.mean((2, 3)).unsqueeze(1)).sigmoid().view(S, S, 1, 1)


# name -> (dimension of the inputs, samples and channels of the map, what makes it, its modules)
CASES: dict[str, tuple[int, tuple[int, int], Callable[..., Any], list[Callable[[], nn.Module]]]] = {
    "conv2d": (4, NC, lambda x, w, f: f(x), [conv2d]),
    "conv1d": (3, NC, lambda x, w, f: f(x), [lambda: nn.Conv1d(S, S, 1)]),
    "transposed conv": (3, NC, lambda x, w, f: f(x), [lambda: nn.ConvTranspose1d(S, S, 1)]),
    "channels_last": (
        4,
        NC,
        lambda x, w, f: f(x.contiguous(memory_format=torch.channels_last)),
        [conv2d],
    ),
    "conv, norm, act, pool": (
        4,
        NC,
        lambda x, w, f, g: F.max_pool2d(g(f(x)).relu(), 3, 1, 1),
        [conv2d, lambda: nn.BatchNorm2d(S).eval()],
    ),
    "group norm": (3, NC, lambda x, w, f: f(x * 2), [lambda: nn.GroupNorm(2, S)]),
    "instance norm": (
        4,
        NC,
        lambda x, w, f, g: g(f(x)),
        [conv2d, lambda: nn.InstanceNorm2d(S, affine=True)],
    ),
    "NHWC": (4, (0, 3), lambda x, w, f: f(x).permute(0, 2, 3, 1), [conv2d]),
    "NHWC linear": (4, (0, 3), lambda x, w, f: F.gelu(f(x)), [linear]),
    "patches": (
        4,
        NLC,
        lambda x, w, f: f(x).flatten(2).transpose(1, 2),
        [lambda: nn.Conv2d(S, S, 2, 2)],
    ),
    "a linear layer": (3, NLC, lambda x, w, f: f(x), [linear]),
    "F.linear": (3, NLC, lambda x, w: F.linear(x, w), []),
    "a product": (3, NLC, lambda x, w: x @ w, []),
    "einsum": (3, NLC, lambda x, w: torch.einsum("ntc,oc->nto", x, w), []),
    "a weight on the left": (3, NC, lambda x, w: w @ x, []),
    "layer norm": (3, NLC, lambda x, w, f: f(x * 2), [lambda: nn.LayerNorm(S)]),
    "RMS norm": (3, NLC, lambda x, w, f, g: g(f(x)), [linear, lambda: nn.RMSNorm(S)]),
    "tokens first": (3, LNC, lambda x, w, f: f(x.transpose(0, 1)), [linear]),
    "tokens first, permuted later": (3, LNC, lambda x, w, f: f(x).transpose(0, 1), [linear]),
    "an embedding": (2, NLC, lambda x, w, f: f(x), [lambda: nn.Embedding(9, S)]),
    "an embedding, tokens first": (
        2,
        LNC,
        lambda x, w, f: f(x.t()),
        [lambda: nn.Embedding(9, S)],
    ),
    "a tuple": (3, NLC, lambda x, w, f: (f(x), None), [linear]),
    "a dict": (3, LNC, lambda x, w, f: {"map": f(x.transpose(0, 1))}, [linear]),
    "windows": (4, (0, 3), windows, [linear]),
    "heads": (3, NLC, heads, [lambda: nn.Linear(S, 3 * S)]),
    "fused attention": (
        3,
        NLC,
        lambda x, w, f: F.scaled_dot_product_attention(*f(x).chunk(3, -1)),
        [lambda: nn.Linear(S, 3 * S)],
    ),
    "nn.MultiheadAttention": (
        3,
        LNC,
        lambda x, w, f: f(*[x.transpose(0, 1)] * 3),
        [lambda: nn.MultiheadAttention(S, 2)],
    ),
    "nn.TransformerEncoderLayer": (
        3,
        NLC,
        lambda x, w, f: f(x),
        [lambda: nn.TransformerEncoderLayer(S, 2, 8, 0.0, batch_first=True)],
    ),
    "nn.LSTM": (3, NLC, lambda x, w, f: f(x), [lambda: nn.LSTM(S, S, batch_first=True)]),
    "nn.GRU": (3, LNC, lambda x, w, f: f(x.transpose(0, 1)), [lambda: nn.GRU(S, S)]),
    "video": (
        5,
        (0, 2),
        lambda x, w, f: f(x.flatten(0, 1)).unflatten(0, (S, S)),
        [conv2d],
    ),
    "channel shuffle": (4, NC, shuffle, [conv2d]),
    "pixel shuffle": (
        4,
        NC,
        lambda x, w, f: F.pixel_shuffle(f(x), 2),
        [lambda: nn.Conv2d(S, 4 * S, 2, 2)],
    ),
    "cat with a token": (
        3,
        NLC,
        lambda x, w, f: torch.cat((w[None, :1].expand(S, 1, S), f(x)), 1)[:, :S],
        [linear],
    ),
    "positions": (3, NLC, lambda x, w, f: f(x) + w, [linear]),
    "merged patches": (
        4,
        (0, 3),
        lambda x, w, f: f(torch.cat((x, x.roll(1, 1)), -1)),
        [lambda: nn.Linear(2 * S, S)],
    ),
    "upsampled": (4, NC, lambda x, w, f: F.interpolate(f(x), (S, S)), [lambda: nn.Conv2d(S, S, 2)]),
    "mixer": (3, NLC, mixer, [linear, linear]),
    "excited": (4, NC, excited, [conv2d, lambda: nn.Conv1d(1, 1, 3, padding=1)]),
}


def inputs(dims: int) -> Tensor:
    return torch.arange(S * S).view(S, S) % 9 if dims == 2 else torch.randn([S] * dims)


def miro(model: nn.Module, **more: Any) -> fastdg.MIRO:
    base = SGD(model.parameters(), lr=0.1)
    return fastdg.MIRO(base, model, **{"layers": ["layer"], "weight": 1.0, **more})


@pytest.mark.parametrize("name", CASES)
def test_channels_are_where_an_operation_puts_them(name: str) -> None:
    dims, layout, run, parts = CASES[name]
    model = Model(layout[0], run, *(part() for part in parts))
    opt = miro(model)
    model(inputs(dims))
    assert opt._encoders["layer"].layout == layout
    assert opt.biases["layer"].shape == (S,)


@pytest.mark.parametrize("name", ["conv2d", "NHWC", "heads", "tokens first", "video"])
@pytest.mark.parametrize("algorithm", [lambda opt: opt, fastdg.AgrSum], ids=["alone", "AgrSum"])
def test_the_loss_is_that_of_these_channels(name: str, algorithm: Any) -> None:
    """In float64, against a plain computation; the variances are not all the same."""
    dims, layout, run, parts = CASES[name]
    model = Model(layout[0], run, *(part() for part in parts)).double()
    oracle, x = copy.deepcopy(model), inputs(dims).double()
    opt = algorithm(miro(model, oracle=oracle))
    term = opt if isinstance(opt, fastdg.MIRO) else opt.base
    model(x)  # the variances have a size now
    with torch.no_grad():
        term.biases["layer"].copy_(torch.linspace(-2, 0, S))
        model.layer.weight.add_(0.1)
        for p in model.layer.parts.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y, d = torch.arange(S) % 3, torch.zeros(S, dtype=torch.long)
    bias = term.biases["layer"].detach().clone().requires_grad_()
    got, other = model.layer(x), oracle.layer(x)
    shape = [1] * got.dim()
    shape[layout[1]] = S
    variance = (F.softplus(bias) + 1e-5).view(shape)
    reg = 0.5 * ((got - other).square() / variance + variance.log()).mean()
    expected = torch.autograd.grad(reg, [bias, *model.layer.parts.parameters()])
    losses = F.cross_entropy(model(x), y, reduction="none")
    weights = list(model.layer.parts.parameters())
    task = torch.autograd.grad(losses.mean(), weights, retain_graph=True)
    opt.zero_grad()
    opt.backward(losses, d)
    close(opt.statistics["miro"], reg)
    close(term.biases["layer"].grad, expected[0])
    for p, of_reg, of_task in zip(weights, expected[1:], task, strict=True):
        close(p.grad, of_reg + of_task)


UNKNOWN: dict[str, tuple[int, Callable[..., Any], list[Callable[[], nn.Module]], str]] = {
    "heads and their channels": (
        3,
        lambda x, w, f: f(x).view(S, S, 2, 2).transpose(1, 2),
        [linear],
        "the channels",
    ),
    "tokens mixed": (3, lambda x, w, f: w @ f(x), [linear], "the channels"),
    "the input itself": (3, lambda x, w: x, [], "the channels"),
    "an operation without a rule": (
        3,
        lambda x, w, f: torch.cdist(f(x), f(x)),
        [linear],
        "the channels",
    ),
    "samples sorted": (
        3,
        lambda x, w, f: f(x[torch.arange(S)[:, None], torch.arange(S)]),
        [linear],
        "the 4 samples",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_layout_is_asked_for(name: str) -> None:
    dims, run, parts, missing = UNKNOWN[name]
    model = Model(0, run, *(part() for part in parts))
    opt = miro(model)
    x = inputs(dims)
    message = rf"layouts: cannot tell .* of 'layer' has {missing}. Pass layouts=\{{'layer': 'NC'\}}"
    with pytest.raises(ValueError, match=message):
        model(x)
    del opt
    for given in ((0, 2), {"layer": (0, -1)}):
        told = miro(Model(0, run, *(part() for part in parts)), layouts=given)
        told.model(x)
        assert told._encoders["layer"].layout in ((0, 2), (0, -1))


def test_a_given_layout_wins() -> None:
    model = Model(0, lambda x, w, f: f(x), linear())
    opt = miro(model, layouts="NC")
    model(inputs(3))
    assert opt._encoders["layer"].layout == (0, 1)
    wide = Model(0, lambda x, w, f: f(x), nn.Linear(S, 7))
    told, seen = miro(wide, layouts="NC"), miro(wide)
    wide(inputs(3))
    assert [told.biases["layer"].numel(), seen.biases["layer"].numel()] == [4, 7]


def test_a_given_layout_has_to_fit() -> None:
    model = Model(0, lambda x, w, f: f(x), linear())
    opt = miro(model, layouts={"layer": (0, 3)})
    with pytest.raises(ValueError, match=r"^layouts: .*'layer'.*\(4, 4, 4\)"):
        model(inputs(3))
    del opt


def test_inputs_with_tokens_first_are_told_by_the_losses() -> None:
    model = Model(1, lambda x, w, f: f(x), linear())
    opt = miro(model)
    x, y = torch.randn(7, 5, S), torch.arange(5) % 3
    losses = F.cross_entropy(model(x), y, reduction="none")
    with pytest.raises(ValueError, match=r"^losses: .*7 samples.*layouts='LNC'"):
        opt.backward(losses, y)
    told = miro(model, layouts="LNC")
    told.backward(F.cross_entropy(model(x), y, reduction="none"), y)
    told.step()


class Box:
    """A container that torch knows nothing of."""

    def __init__(self, image: Tensor) -> None:
        self.image = image


def test_inputs_in_a_container() -> None:
    model = Model(0, lambda x, w, f: f(x.image.transpose(0, 1)).transpose(0, 1), linear())
    opt = miro(model)
    model(Box(inputs(3)))
    assert opt._encoders["layer"].layout == NLC


def test_a_frozen_stem_has_channels_too() -> None:
    """Its map has no graph."""
    model = Model(0, lambda x, w, f: f(x).flatten(2).transpose(1, 2), conv2d())
    model.layer.requires_grad_(False)
    opt = miro(model)
    y = torch.arange(S) % 3
    opt.backward(F.cross_entropy(model(torch.randn(S, S, 2, 2)), y, reduction="none"), y)
    assert opt._encoders["layer"].layout == NLC
    assert opt.biases["layer"].grad is not None


def test_under_autocast_and_in_another_dtype() -> None:
    for dtype in (None, torch.bfloat16):
        model = Model(0, *CASES["windows"][2:3], linear())
        opt = miro(model, dtype=dtype)
        with torch.autocast(DEVICE, torch.bfloat16):
            model(inputs(4))
        assert opt._encoders["layer"].layout == (0, 3)


@pytest.mark.parametrize("name", ["NHWC", "windows", "heads", "tokens first"])
def test_a_first_batch_of_one_sample(name: str) -> None:
    dims, layout, run, parts = CASES[name]
    model = Model(layout[0], run, *(part() for part in parts))
    opt = miro(model)
    model(inputs(dims)[:1])
    assert opt._encoders["layer"].layout == layout


def test_a_map_of_one_position() -> None:
    model = Model(0, lambda x, w, f: f(x), nn.Conv2d(S, 1, 1))
    opt = miro(model)
    model(torch.randn(1, S, 1, 1))
    assert opt._encoders["layer"].layout == NC


def test_a_compiled_part() -> None:
    part = torch.compile(nn.Sequential(nn.Linear(S, S), nn.ReLU()), backend="eager")
    model = Model(1, lambda x, w, f: f(x.transpose(0, 1)), part)
    opt = miro(model)
    model(inputs(3))
    assert opt._encoders["layer"].layout == LNC
