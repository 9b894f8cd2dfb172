"""Every module class of torch.nn that is no container and no loss: arguments and a sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from zoo_cases import Case, N, tensor_of, words

# Containers, losses and classes that are no layer: those without an entry.
LEFT_OUT = {
    "AdaptiveLogSoftmaxWithLoss": "a loss of several values",
    "Container": "a container",
    "LinearCrossEntropyOptions": "no module",
    "Module": "the base class",
    "ModuleDict": "a container",
    "ModuleList": "a container",
    "NLLLoss2d": "a loss",
    "ParameterDict": "a container",
    "ParameterList": "a container",
    "RNNBase": "a base class",
    "RNNCellBase": "a base class",
    "Sequential": "a container",
    "SyncBatchNorm": "a module for several processes with GPUs",
}

VECTOR, SEQUENCE = (4,), (4, 8)
IMAGE, VOLUME = (4, 8, 8), (4, 6, 6, 6)
BY_DIMENSION = {1: SEQUENCE, 2: IMAGE, 3: VOLUME}

# name -> (arguments, shapes of a sample's inputs)
TABLE: dict[str, tuple[tuple[Any, ...], tuple[tuple[int, ...], ...]]] = {
    "Bilinear": ((4, 4, 3), (VECTOR, VECTOR)),
    "ChannelShuffle": ((2,), (IMAGE,)),
    "CosineSimilarity": ((), (SEQUENCE, SEQUENCE)),
    "CrossMapLRN2d": ((3,), (IMAGE,)),
    "Flatten": ((), (IMAGE,)),
    "Fold": (((4, 4), 2, 1, 0, 2), ((16, 4),)),
    "FractionalMaxPool2d": ((2, 4), (IMAGE,)),
    "FractionalMaxPool3d": ((2, 3), (VOLUME,)),
    "GLU": ((1,), (IMAGE,)),
    "GroupNorm": ((2, 4), (IMAGE,)),
    "Identity": ((), (VECTOR,)),
    "LayerNorm": ((8,), (SEQUENCE,)),
    "LazyLinear": ((3,), (VECTOR,)),
    "Linear": ((4, 3), (VECTOR,)),
    "LocalResponseNorm": ((3,), (IMAGE,)),
    "LogSoftmax": ((1,), (SEQUENCE,)),
    "PReLU": ((4,), (IMAGE,)),
    "PairwiseDistance": ((), (VECTOR, VECTOR)),
    "PixelShuffle": ((2,), (IMAGE,)),
    "PixelUnshuffle": ((2,), (IMAGE,)),
    "RMSNorm": ((8,), (SEQUENCE,)),
    "Softmax": ((1,), (SEQUENCE,)),
    "Softmax2d": ((), (IMAGE,)),
    "Softmin": ((1,), (SEQUENCE,)),
    "Threshold": ((0.1, 0.2), (IMAGE,)),
    "Unflatten": ((1, (2, 2)), (VECTOR,)),
    "Unfold": ((2,), (IMAGE,)),
    "Upsample": ((None, 2), (IMAGE,)),
    "UpsamplingBilinear2d": ((None, 2), (IMAGE,)),
    "UpsamplingNearest2d": ((None, 2), (IMAGE,)),
}
for _name in words(
    "AlphaDropout CELU Dropout ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU "
    "LogSigmoid Mish RReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh "
    "Tanhshrink"
):
    TABLE[_name] = ((), (VECTOR,))
TABLE["FeatureAlphaDropout"] = ((), (IMAGE,))
for _d, _shape in BY_DIMENSION.items():
    for _name, _arguments in {
        "AdaptiveAvgPool": (2,),
        "AdaptiveMaxPool": (2,),
        "AvgPool": (2,),
        "BatchNorm": (4,),
        "CircularPad": (1,),
        "ConstantPad": (1, 0.5),
        "Conv": (4, 3, 3, 1, 1),
        "ConvTranspose": (4, 3, 2, 2),
        "Dropout": (),
        "LPPool": (2, 2),
        "LazyBatchNorm": (),
        "LazyConv": (3, 3),
        "LazyConvTranspose": (3, 2),
        "LazyInstanceNorm": (1e-5, 0.1, True),
        "MaxPool": (2,),
        "ReflectionPad": (1,),
        "ReplicationPad": (1,),
        "ZeroPad": (1,),
    }.items():
        TABLE[f"{_name}{_d}d"] = (_arguments, (_shape,))
    TABLE[f"InstanceNorm{_d}d"] = ((4, 1e-5, 0.1, True), (_shape,))


class Gained(nn.Module):
    """``inner`` of inputs that each have a learned gain: what lies below it has parameters too."""

    def __init__(self, inner: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.inner = inner
        self.gains = nn.ParameterList(0.5 + torch.rand(shape) for shape in shapes)

    def forward(self, *inputs: Tensor) -> Any:
        return self.inner(*(x * gain for x, gain in zip(inputs, self.gains, strict=True)))


def from_table(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A module of the table, with gains on its inputs."""
    arguments, shapes = TABLE[name]
    model = Gained(getattr(nn, name)(*arguments), shapes)
    inputs = [torch.randn(N, *shape) for shape in shapes]
    if name.startswith("Lazy"):
        with torch.no_grad():
            model(*inputs)  # makes its parameters
    return model, lambda: tensor_of(model(*inputs))


def recurrent(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Two layers, both directions, samples first."""
    kind = getattr(nn, name)
    model = Gained(kind(4, 3, 2, batch_first=True, bidirectional=True, dropout=0.2), ((5, 4),))
    x = torch.randn(N, 5, 4)
    return model, lambda: tensor_of(model(x))


def cell(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Three steps, so that the state has a gradient."""
    inner = getattr(nn, name)(4, 3)
    x, gain = torch.randn(3, N, 4), nn.Parameter(torch.rand(4))
    inner.gain = gain

    def run() -> Tensor:
        state = None
        for step in x:
            state = inner(step * gain, state)
        return tensor_of(state)

    return inner, run


def embedding(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Rows of a table; of a bag the mean."""
    model, x = getattr(nn, name)(10, 4), torch.randint(0, 10, (N, 5))
    return model, lambda: model(x)


def unpool(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Of the indices of the pool before it."""
    shape = BY_DIMENSION[int(name[-2])]
    pool = getattr(nn, name.replace("Unpool", "Pool"))(2, return_indices=True)
    back = getattr(nn, name)(2)
    model = Gained(pool, (shape,))
    model.back = back
    x = torch.randn(N, *shape)
    return model, lambda: back(*model(x))


def attention(name: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Samples first; the weights are made too."""
    inner = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
    model = Gained(inner, ((5, 4),) * 3)
    inputs = [torch.randn(N, 5, 4) for _ in range(3)]
    return model, lambda: tensor_of(model(*inputs))


def transformer(name: str, batch_first: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Tokens of width 4, for those with a decoder a memory too."""
    layer = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "batch_first": batch_first}
    inner: nn.Module
    if name == "Transformer":
        inner = nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **layer)
        inner.encoder.enable_nested_tensor = False
    elif name.endswith("Layer"):
        inner = getattr(nn, name)(**layer)
    else:
        one = getattr(nn, f"{name}Layer")(**layer)
        extra = {"enable_nested_tensor": False} if name == "TransformerEncoder" else {}
        inner = getattr(nn, name)(one, 2, **extra)
    count = 1 if "Encoder" in name else 2
    gain = (5, 4) if batch_first else (5, 1, 4)
    model = Gained(inner, (gain,) * count)
    shape = (N, 5, 4) if batch_first else (5, N, 4)
    inputs = [torch.randn(shape) for _ in range(count)]
    return model, lambda: tensor_of(model(*inputs))


MAKERS: dict[str, Callable[[str], tuple[nn.Module, Callable[[], Tensor]]]] = {
    **dict.fromkeys(("RNN", "GRU", "LSTM"), recurrent),
    **dict.fromkeys(("RNNCell", "GRUCell", "LSTMCell"), cell),
    **dict.fromkeys(("Embedding", "EmbeddingBag"), embedding),
    **{f"MaxUnpool{d}d": unpool for d in (1, 2, 3)},
    "MultiheadAttention": attention,
}
TRANSFORMERS = (
    "Transformer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
)


def cases() -> list[Case]:
    """One for each class; transformers samples first and tokens first."""
    out = [Case("torch.nn", name, partial(from_table, name)) for name in TABLE]
    out += [Case("torch.nn", name, partial(make, name)) for name, make in MAKERS.items()]
    for name in TRANSFORMERS:
        out.append(Case("torch.nn", name, partial(transformer, name, True)))
        first = f"{name}, tokens first"
        out.append(Case("torch.nn", first, partial(transformer, name, False), 1))
    return sorted(out, key=lambda case: case.name)


def without_entry() -> set[str]:
    """Names of torch.nn's module classes that the zoo has no case of, losses apart."""
    classes = {name for name in nn.modules.__all__ if isinstance(getattr(nn, name), type)}
    known = {case.name for case in cases()}
    return {name for name in classes if not name.endswith("Loss")} - known - set(LEFT_OUT)
