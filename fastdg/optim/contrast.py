"""How far two views of the same images are apart: what self-supervised encoders minimise."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..statistics.factors import accumulated
from .settings import check_share, check_steepness


class Objective(nn.Module):
    """Base of objectives that compare two views, each of which is embedded by itself.

    So a view that is compared with many is embedded once. Implement `embed` and `loss`.

    Args:
        network: images -> embeddings ``[B, E]``: the encoder and its projection head.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network: expected an nn.Module, got {type(network).__name__}")
        self.network = network

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        """What `loss` needs of one view."""

    @abstractmethod
    def loss(self, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> Tensor:
        """The distance of two embedded views of the same images, 0-dim."""

    def follow(self) -> None:
        """Called after each step of the encoder."""

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        """The distance of two views of the same images, 0-dim."""
        return self.loss(self.embed(one), self.embed(two))


class SimCLR(Objective):
    r"""Normalised temperature-scaled cross-entropy (NT-Xent) over both views of a batch.

    .. math::
        \tfrac1{2B}\sum_{i=1}^{2B} -\log \frac{e^{\cos(z_i, z_{i'})/\tau}}
        {\sum_{j\ne i} e^{\cos(z_i, z_j)/\tau}}

    with :math:`i'` the other view of image i. A batch holds at least two images.

    Args:
        network: images -> z ``[B, E]``: the encoder and its projection head.
        temperature: :math:`\tau`; default: ADIOS's.

    Reference:
        Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
        Representations, ICML 2020.
    """

    def __init__(self, network: nn.Module, temperature: float = 0.2) -> None:
        super().__init__(network)
        check_steepness("temperature", temperature)
        self.temperature = temperature

    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.network(images),)

    def loss(self, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> Tensor:
        z = F.normalize(accumulated(torch.cat([*one, *two])), dim=1)
        B = len(z) // 2
        similar = z @ z.t() / self.temperature
        similar = similar.masked_fill(
            torch.eye(2 * B, dtype=torch.bool, device=z.device), -torch.inf
        )
        other = torch.arange(2 * B, device=z.device).roll(B)
        return F.cross_entropy(similar, other)


class SimSiam(Objective):
    r"""Each view predicts the other, whose gradient is stopped:
    :math:`-\tfrac12\cos(p_1, z_2) - \tfrac12\cos(p_2, z_1)`, the mean over images.

    Args:
        network: images -> z ``[B, E]``: the encoder and its projection head.
        predictor: z -> p ``[B, E]``.

    Reference:
        Chen, He: Exploring Simple Siamese Representation Learning, CVPR 2021.
    """

    def __init__(self, network: nn.Module, predictor: nn.Module) -> None:
        super().__init__(network)
        self.predictor = _module(predictor)

    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        z = self.network(images)
        return self.predictor(z), z.detach()

    def loss(self, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> Tensor:
        return -(_cosine(one[0], two[1]) + _cosine(two[0], one[1])) / 2


class BYOL(Objective):
    r"""Each view predicts what a slow copy of the network makes of the other:
    :math:`(2 - 2\cos(p_1, t_2)) + (2 - 2\cos(p_2, t_1))`, the mean over images.

    After each step of the encoder the copy's parameters move: :math:`\theta' \leftarrow
    m\theta' + (1-m)\theta`; its running statistics are of its own forwards.

    Args:
        network: images -> ``[B, E]``: the encoder and its projection head.
        predictor: ``[B, E]`` -> p ``[B, E]``.
        momentum: m.

    Reference:
        Grill et al.: Bootstrap Your Own Latent, NeurIPS 2020.
    """

    def __init__(self, network: nn.Module, predictor: nn.Module, momentum: float = 0.99) -> None:
        super().__init__(network)
        check_share("momentum", momentum)
        self.predictor, self.momentum = _module(predictor), momentum
        self.target = copy.deepcopy(network).requires_grad_(False)

    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            target = self.target(images)
        return self.predictor(self.network(images)), target

    def loss(self, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> Tensor:
        return 4 - 2 * _cosine(one[0], two[1]) - 2 * _cosine(two[0], one[1])

    @torch.no_grad()
    def follow(self) -> None:
        slow: list[Tensor] = list(self.target.parameters())
        fast: list[Tensor] = list(self.network.parameters())
        torch._foreach_lerp_(slow, fast, 1 - self.momentum)


def _cosine(one: Tensor, two: Tensor) -> Tensor:
    return F.cosine_similarity(accumulated(one), accumulated(two)).mean()


def _module(predictor: Any) -> nn.Module:
    if not isinstance(predictor, nn.Module):
        raise TypeError(f"predictor: expected an nn.Module, got {type(predictor).__name__}")
    return predictor
