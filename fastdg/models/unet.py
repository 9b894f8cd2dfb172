"""A small U-Net that divides an image into masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNetMasker(nn.Module):
    r"""Soft masks of an image, which sum to one at every pixel: images ``[B, C, H, W]`` ->
    ``[B, N, H, W]``.

    A U-Net: ``depth`` times half the resolution and twice the channels, and back, each level
    concatenated with its output on the way down; a softmax over the N masks. Groups of channels are
    normalised within one image, so that there are no running statistics and no other images in it.
    The authors' U-Net takes images of one size only: a perceptron joins all pixels at its bottom.

    Args:
        masks: N, at least 2.
        channels: C of the images.
        width: channels at full resolution, a multiple of 4.
        depth: how often the resolution is halved; images have at least :math:`2^\text{depth}`
            pixels a side.

    Raises:
        ValueError: an argument is not as described.

    Reference:
        Shi, Siddharth, Torr, Kosiorek: Adversarial Masking for Self-Supervised Learning, ICML 2022.
    """

    def __init__(self, masks: int, channels: int = 3, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        for name, value, least in (
            ("masks", masks, 2),
            ("channels", channels, 1),
            ("width", width, 4),
            ("depth", depth, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
        if width % 4:
            raise ValueError(f"width: expected a multiple of 4, got {width}")
        widths = [width * 2**level for level in range(depth + 1)]
        self.depth, self.channels = depth, channels
        self.down = nn.ModuleList(
            [_block(channels, width), *(_block(a, 2 * a) for a in widths[:-1])]
        )
        self.up = nn.ModuleList([_block(3 * a, a) for a in reversed(widths[:-1])])
        self.head = nn.Conv2d(width, masks, 1)

    def forward(self, images: Tensor) -> Tensor:
        least = 2**self.depth
        if images.dim() != 4 or images.shape[1] != self.channels or min(images.shape[2:]) < least:
            raise ValueError(
                f"images: expected [B, {self.channels}, H, W] with H and W at least {least}, got "
                f"{list(images.shape)}"
            )
        levels = [self.down[0](images)]
        for block in self.down[1:]:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for block in self.up:
            beside = levels.pop()
            # To its size and not to twice the size: that may be odd
            x = block(torch.cat([beside, F.interpolate(x, beside.shape[2:])], 1))
        return self.head(x).softmax(1)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False)]
        layers += [nn.GroupNorm(4, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
