"""The ResNet-20 for 32x32 images, and its published CIFAR-10 weights.

Reference:
    He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2. The
    names follow github.com/akamaster/pytorch_resnet_cifar10, whose weights load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import load_arrays, load_torch

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the input's RGB in [0, 1]


class Block(nn.Module):
    """Two convolutions; where the shape changes the shortcut subsamples and pads with zeros."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - before

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            half = self.more // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """Images ``[N, 3, 32, 32]`` to logits ``[N, classes]``; batch norm keeps its pre-trained
    statistics, in training too."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))

    def train(self, mode: bool = True) -> ResNet20:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def load_published(self, path: Path) -> None:
        """Load all but the last layer.

        Args:
            path: the published ``resnet20-12fca82f.th``, or its arrays by name in an ``.npz``.

        Raises:
            ValueError: the file is damaged, or not that.
            OSError: it cannot be read.
        """
        remedy = "Download it again."
        found: dict[str, Any]
        if path.suffix == ".npz":
            arrays = load_arrays(path, remedy=remedy)
            found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        else:
            found = load_torch(path, remedy)
            found = found.get("state_dict", found) if isinstance(found, dict) else {}
        state = {str(name).removeprefix("module."): value for name, value in found.items()}
        wanted = {n: x for n, x in self.state_dict().items() if not n.startswith("linear.")}
        for name, own in wanted.items():
            value = state.get(name)
            if value is None and name.endswith("num_batches_tracked"):
                continue
            if not isinstance(value, Tensor) or value.shape != own.shape:
                got = list(value.shape) if isinstance(value, Tensor) else "none"
                raise ValueError(
                    f"{path}: expected the weights of CIFAR-10's ResNet-20, {name!r} of shape "
                    f"{list(own.shape)} among them, got {got}. {remedy}"
                )
            if not value.isfinite().all():
                raise ValueError(f"{path}: damaged, {name!r} is not finite. {remedy}")
        self.load_state_dict({n: state[n] for n in wanted if n in state}, strict=False)
