"""Every layer against one backward pass a sample, in float64, first and second order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import assert_statistics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

N = 6


@pytest.fixture(autouse=True)
def _float64() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Wrapped(nn.Module):
    """A layer under test between others, so that its input and its output carry gradients."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None):
        super().__init__()
        self.layer, self.call = layer, call or (lambda layer, x: layer(x))
        self.gain = nn.Linear(1, 1)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gain(x.unsqueeze(-1)).squeeze(-1)
        return self.head(torch.tanh(self.call(self.layer, x)).flatten(1))


def losses_on(x: Tensor) -> Callable[[nn.Module], Tensor]:
    target = torch.randint(0, 3, (x.shape[0],))
    return lambda model: nn.functional.cross_entropy(model(x), target, reduction="none")


def verify(
    layer: nn.Module,
    x: Tensor,
    call: Callable[..., Tensor] | None = None,
    slow: bool = False,
) -> None:
    for p in layer.parameters():  # affine weights start at 1 and 0, where mistakes hide
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    model = Wrapped(layer, call)
    with torch.no_grad():
        model(x)  # makes the lazy head
    assert_statistics(model, losses_on(x), slow=slow)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_linear(leading: tuple[int, ...], bias: bool) -> None:
    verify(nn.Linear(4, 3, bias=bias), torch.randn(N, *leading, 4))


CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "valid": {"padding": "valid", "stride": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "same, reflect, dilation": {"padding": "same", "padding_mode": "reflect", "dilation": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8, "stride": 2},
    "no bias": {"bias": False},
    "pointwise": {"kernel_size": 1, "stride": 2},
    "rows left over": {"stride": 3, "kernel_size": 2},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution(dims: int, options: dict[str, object]) -> None:
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    settings = {"in_channels": 4, "out_channels": 2, "kernel_size": 3, **options}
    sizes = (6, 5, 5)[:dims] if dims == 3 else (7, 6)[:dims]
    verify(cls(**settings), torch.randn(N, 4, *sizes))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
        {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"},
        {"kernel_size": (1, 3), "padding": (0, 2), "padding_mode": "replicate"},
    ],
)
def test_convolution_uneven(options: dict[str, object]) -> None:
    verify(nn.Conv2d(2, 4, **options), torch.randn(N, 2, 7, 6))


def test_convolution_channels_last() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(N, 3, 6, 5).to(memory_format=torch.channels_last)
    verify(layer, x, lambda layer, x: layer(x.to(memory_format=torch.channels_last)))


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), (4,)),
    "LayerNorm, sequence": (lambda: nn.LayerNorm(4), (3, 4)),
    "LayerNorm, two dimensions": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "LayerNorm, no bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (3, 4)),
    "RMSNorm, eps": (lambda: nn.RMSNorm((3, 4), eps=0.1), (3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "GroupNorm, vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 2)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 3, 2, 2)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4).eval(), (4,)),
    "BatchNorm1d, sequence": (lambda: nn.BatchNorm1d(4).eval(), (4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4).eval(), (4, 3, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2).eval(), (2, 3, 2, 2)),
}


@pytest.mark.parametrize(("make", "shape"), NORMS.values(), ids=NORMS.keys())
def test_norm(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer = make()
    if getattr(layer, "running_mean", None) is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    verify(layer, torch.randn(N, *shape))


@pytest.mark.parametrize("training", [True, False])
def test_instance_norm_with_running_statistics(training: bool) -> None:
    layer = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    verify(layer.train(training), torch.randn(N, 4, 3, 2))


class Tokens(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return self.head(torch.tanh(x.flatten(1, -2).sum(1) if x.dim() > 2 else x))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}, {"sparse": True}])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_embedding(shape: tuple[int, ...], options: dict[str, object]) -> None:
    tokens = torch.randint(0, 7, (N, *shape))
    if shape:
        tokens[0] = 2  # one row, over and over: the padding where there is some
        tokens[1] = 6
    model = Tokens(**options)
    with torch.no_grad():
        model.table.weight.normal_()
    target = torch.randint(0, 3, (N,))
    losses = lambda m: nn.functional.cross_entropy(m(tokens), target, reduction="none")  # noqa: E731
    assert_statistics(
        model, losses, twice="sparse" not in options
    )  # torch: no second derivative there


def attend(layer: nn.MultiheadAttention, x: Tensor, **options: object) -> Tensor:
    """Samples first outside, whatever the layer likes inside."""
    inner = x if layer.batch_first else x.transpose(0, 1)
    out = layer(inner, inner, inner, **options)[0]
    return out if layer.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(batch_first: bool, weights: bool) -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    with sdpa_kernel(SDPBackend.MATH):
        verify(layer, torch.randn(N, 3, 4), lambda m, x: attend(m, x, need_weights=weights))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [3, N], ids=["", "as many tokens as samples"])
@pytest.mark.parametrize("mask", ["causal", "padding", "heads"])
def test_attention_masks(mask: str, length: int, batch_first: bool) -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    causal = torch.ones(length, length).triu(1).bool()
    padding = torch.zeros(N, length).bool()
    padding[::2, -1] = True
    options = {
        "causal": {"attn_mask": causal},
        "padding": {"key_padding_mask": padding},
        "heads": {"attn_mask": torch.randn(N * 2, length, length)},
    }[mask]
    with sdpa_kernel(SDPBackend.MATH):
        verify(layer, torch.randn(N, length, 4), lambda m, x: attend(m, x, **options))


def test_attention_across() -> None:
    layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True, add_bias_kv=True)
    key, value = torch.randn(N, 5, 3), torch.randn(N, 5, 2)
    with sdpa_kernel(SDPBackend.MATH):
        verify(layer, torch.randn(N, 3, 4), lambda m, x: m(x, key, value)[0], True)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layer(norm_first: bool, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        4, 2, 6, dropout=0.0, batch_first=True, norm_first=norm_first
    ).train(training)
    with sdpa_kernel(SDPBackend.MATH):
        verify(layer, torch.randn(N, 3, 4))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent(
    cls: type[nn.RNNBase], batch_first: bool, layers: int, bidirectional: bool
) -> None:
    layer = cls(4, 3, layers, batch_first=batch_first, bidirectional=bidirectional)

    def call(m: nn.RNNBase, x: Tensor) -> Tensor:
        out = m(x if batch_first else x.transpose(0, 1))[0]
        return out if batch_first else out.transpose(0, 1)

    verify(layer, torch.randn(N, 3, 4), call)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("projection", [0, 2])
def test_recurrent_with_state(projection: int, batch_first: bool) -> None:
    layer = nn.LSTM(4, 3, proj_size=projection, batch_first=batch_first)
    hidden, cell = torch.randn(1, N, projection or 3), torch.randn(1, N, 3)

    def call(m: nn.LSTM, x: Tensor) -> Tensor:
        out, (h, c) = m(x if batch_first else x.transpose(0, 1), (hidden, cell))
        out = out if batch_first else out.transpose(0, 1)
        return torch.cat([out.flatten(1), h[0], c[0]], 1)

    verify(layer, torch.randn(N, 3, 4), call)


def test_recurrent_final_state_only() -> None:
    verify(nn.GRU(4, 3, batch_first=True), torch.randn(N, 5, 4), lambda m, x: m(x)[1][0])


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell])
def test_recurrent_cell(cls: type[nn.Module]) -> None:
    def call(cell: nn.Module, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state

    verify(cls(4, 3), torch.randn(N, 3, 4), call)


class OwnNorm(nn.Module):
    """A norm written out, as in many models: the generic rule has to differentiate it."""

    def __init__(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.w, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.w, self.b)


NORMS = {
    "layer": lambda x, w, b: F.layer_norm(x.transpose(1, 2), (4,), w, b).transpose(1, 2),
    "rms": lambda x, w, b: F.rms_norm(x.transpose(1, 2), (4,), w).transpose(1, 2) + b[:, None],
    "group": lambda x, w, b: F.group_norm(x, 2, w, b),
    "instance": lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    "batch": lambda x, w, b: F.batch_norm(x, torch.zeros(4).to(x), torch.ones(4).to(x), w, b),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_norm_without_a_rule(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    verify(OwnNorm(norm), torch.randn(N, 4, 5))


OTHERS = {
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 2, 3, stride=2), (4, 3)),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 3, 2),
    ),
    "PReLU": (lambda: nn.PReLU(4), (4, 3)),
    "PReLU, one slope": (lambda: nn.PReLU(), (4, 3)),
}


@pytest.mark.parametrize(("make", "shape"), OTHERS.values(), ids=OTHERS.keys())
def test_without_a_rule(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    verify(make(), torch.randn(N, *shape))


def test_bilinear() -> None:
    verify(nn.Bilinear(4, 4, 2), torch.randn(N, 3, 4), lambda m, x: m(x, x.flip(-1)), True)
