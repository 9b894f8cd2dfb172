"""The two networks of the GPU's rows, with their own code: nothing to install or to download.

`ResNet50()` and `ViTB16()` have the sizes of the ImageNet models for 224 px; `small` ones have the
same kinds of layers, for rehearsals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from models import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu1, self.relu2, self.relu3 = (nn.ReLU(inplace=True) for _ in range(3))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        return self.relu3(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 with frozen batch norms, as in Fishr's experiments."""

    def __init__(
        self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 65
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            made = []
            for block in range(count):
                made.append(Bottleneck(inputs, width << stage, 2 if stage and not block else 1))
                inputs = 4 * (width << stage)
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.maps = ("stem", *(f"stages.{k}" for k in range(len(blocks))))  # MIRO's
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train = lambda mode=True, m=module: nn.Module.train(m, False)  # type: ignore[method-assign]
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class FusedAttention(Attention):
    """Multi-head self-attention by torch's fused operation."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ViTB16(nn.Module):
    """ViT-B/16: class token and position embedding belong to the root, as timm has them."""

    def __init__(
        self,
        size: int = 224,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch: int = 16,
        classes: int = 65,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        for block in self.blocks:
            block.attention = FusedAttention(dim, heads)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.maps = ("patch", *(f"blocks.{k}" for k in range(2, depth, 3)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(tokens))[:, 0])


@dataclass(frozen=True)
class Size:
    """A batch: samples, pixels, domains."""

    samples: int
    pixels: int
    domains: int = 3


FULL, SMALL = Size(96, 224), Size(6, 32)
NETWORKS = ("resnet50", "vit_b16")


def network(name: str, size: Size) -> nn.Module:
    """One of `NETWORKS`, in training mode, at its full size for 224 px, else a small one."""
    full = size.pixels == FULL.pixels
    if name == "resnet50":
        return ResNet50() if full else ResNet50((1, 1), 8)
    return ViTB16() if full else ViTB16(size.pixels, 32, 3, 2, 8)
