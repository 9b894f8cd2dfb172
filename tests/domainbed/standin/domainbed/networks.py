from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class MNIST_CNN(nn.Module):
    n_outputs = 6

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3, stride=4)
        self.bn0, self.bn1 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 6)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.bn2, self.bn3 = nn.GroupNorm(2, 6), nn.GroupNorm(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv2(self.bn0(self.conv1(x).relu())).relu())
        return self.bn3(self.bn2(x)).mean((2, 3))


class ResNet(nn.Module):
    """What couples the samples of a batch, and what draws: batch norm and dropout."""

    n_outputs = 6

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(channels, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.network(x).mean((2, 3)))


def Featurizer(input_shape: tuple[int, ...], hparams: dict[str, Any]) -> nn.Module:
    return (MNIST_CNN if input_shape[1:] == (28, 28) else ResNet)(input_shape[0])


def Classifier(features: int, classes: int, is_nonlinear: bool = False) -> nn.Module:
    return nn.Linear(features, classes)


class WholeFish(nn.Module):
    def __init__(self, input_shape: Any, num_classes: int, hparams: Any) -> None:
        super().__init__()
        featurizer = Featurizer(input_shape, hparams)
        self.net = nn.Sequential(featurizer, Classifier(featurizer.n_outputs, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
