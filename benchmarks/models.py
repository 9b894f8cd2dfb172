"""The models the benchmarks run: own definitions, random weights, nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DOMAINS = 3


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


class MNISTCNN(nn.Module):
    """DomainBed's network for 2x28x28 images: four 3x3 convolutions with GroupNorm(8)."""

    def __init__(self, channels: int = 2, classes: int = 2) -> None:
        super().__init__()
        widths, strides = (64, 128, 128, 128), (1, 2, 1, 1)
        layers: list[nn.Module] = []
        for width, stride in zip(widths, strides, strict=True):
            layers += [
                nn.Conv2d(channels, width, 3, stride, padding=1),
                nn.ReLU(),
                nn.GroupNorm(8, width),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention from two linear layers and plain matrix products."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Position(nn.Module):
    """A learned vector for each token."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, dim) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class ViT(nn.Module):
    """Vision transformer for 32x32 images: 64 tokens of 4x4 pixels, dim 192, depth 4, 3 heads."""

    def __init__(self, dim: int = 192, depth: int = 4, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.position = Position(64, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.position(self.patch(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with the ImageNet stem; batch norms frozen, as in Fishr's experiments."""

    def __init__(self, classes: int = 65) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        blocks, inputs = [], 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, classes)
        self.eval()

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Head(nn.Module):
    """The last layer of a ResNet-50; its input are the features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(2048, classes)

    def features(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class Tiny(nn.Module):
    """One layer of each kind: what is loaded lazily is loaded after it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@dataclass(frozen=True)
class Spec:
    """How to build one model and a batch for it."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int


SPECS = {
    "mlp": Spec("MLP 784-1024-1024-10", mlp, (784,), 10),
    "mnist_cnn": Spec("MNIST_CNN, 2×28×28", MNISTCNN, (2, 28, 28), 2),
    "vit": Spec("ViT-like, dim 192, depth 4, 64 tokens", ViT, (3, 32, 32), 10),
    "resnet18": Spec("ResNet-18, frozen BN, 3×64×64", ResNet18, (3, 64, 64), 65),
    **{
        f"head{classes}": Spec(
            f"head 2048→{classes}, features given", partial(Head, classes), (2048,), classes
        )
        for classes in (7, 65, 345)  # of PACS, OfficeHome, DomainNet
    },
    "tiny": Spec("one layer of each kind", Tiny, (1, 6, 6), 3),
}


@dataclass
class Problem:
    """A model, a batch of N samples of three domains one after the other, and their losses."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    domains: Tensor

    @property
    def samples(self) -> int:
        return self.x.shape[0]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def losses(self) -> Tensor:
        """Cross-entropy of each sample ``[N]``."""
        return F.cross_entropy(self.model(self.x), self.y, reduction="none")

    def spans(self, chunk: int | None = None) -> list[list[slice]]:
        """The samples of each domain, which lie together as in DomainBed's batches, in chunks."""
        edges = [round(d * self.samples / DOMAINS) for d in range(DOMAINS + 1)]
        return [
            [slice(i, min(i + (chunk or stop), stop)) for i in range(start, stop, chunk or stop)]
            for start, stop in pairwise(edges)
        ]


def problem(name: str, samples: int, dtype: torch.dtype = torch.float32) -> Problem:
    """Model ``name`` with a batch of ``samples``; the same numbers for every call and dtype."""
    spec = SPECS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spec.build()
        # Features are what a ReLU leaves; images are noise around zero.
        x = torch.randn(samples, *spec.shape)
        x = x.relu_() if name.startswith("head") else x
        y = torch.randint(spec.classes, (samples,))
    found = Problem(name, model.to(dtype), x.to(dtype), y, torch.empty(samples, dtype=torch.int64))
    for domain, (span,) in enumerate(found.spans()):
        found.domains[span] = domain
    return found
