"""Objectives of self-supervised encoders: distances between two views of the same images."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch import foreach_lerp_
from ..core.hyper import check_share, check_steepness, check_steps, check_switch
from ..dtypes import to_statistics_dtype


class Objective(nn.Module):
    """Base of objectives that embed each of two views separately, and compare them.

    So a view that is compared with many is embedded once. Implement `embed` and `loss`.

    Args:
        network: images -> embeddings ``[B, E]``: the encoder and its projection head.
    """

    both_views = False  # whether `ADIOS` masks both views; else only the second
    steps = 0  # steps of `ADIOS` before this one, which it sets for `follow`

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network: expected an nn.Module, got {type(network).__name__}.")
        self.network = network

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the input of `loss` from one view."""

    @abstractmethod
    def loss(self, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> Tensor:
        """Compute the distance of two embedded views of the same images, 0-dim."""

    def compare(
        self, whole: Sequence[tuple[Tensor, ...]], masked: Sequence[tuple[Tensor, ...]]
    ) -> Tensor:
        """Compute the loss of one mask in `ADIOS`, 0-dim.

        Args:
            whole: the embedded first view; with ``both_views`` both views.
            masked: the embedded masked second view; with ``both_views`` both masked views.
        """
        return self.loss(whole[0], masked[0])

    def follow(self) -> None:
        """Update own state at the end of each step of `ADIOS`, after the masker's."""

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        """Compute the distance of two views of the same images, 0-dim."""
        return self.loss(self.embed(one), self.embed(two))


class SimCLR(Objective):
    r"""Normalised temperature-scaled cross-entropy (NT-Xent) over both views of a batch.

    .. math::
        \tfrac1{2B}\sum_{i=1}^{2B} -\log \frac{e^{\cos(z_i, z_{i'})/\tau}}
        {\sum_{j\ne i} e^{\cos(z_i, z_j)/\tau}}

    with :math:`i'` the other view of image i. A batch holds at least two images.

    Args:
        network: images -> z ``[B, E]``: the encoder and its projection head.
        temperature: :math:`\tau`. The default is from ADIOS's SimCLR scripts for ImageNet100.

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
        z = F.normalize(to_statistics_dtype(torch.cat([*one, *two])), dim=1)
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

    With it, ADIOS masks one view. With ``both_views``, as in the authors' ADIOS, it masks both:
    with :math:`D(p, z) = -\cos(p, z)`, and :math:`\tilde p, \tilde z` of masked views, the loss is
    the mean of :math:`D(\tilde p_1, z_2), D(\tilde p_2, z_1)` and the selected pairs.

    Args:
        network: images -> z ``[B, E]``: the encoder and its projection head.
        predictor: z -> p ``[B, E]``.
        both_views: mask both views.
        symmetry_mask: with ``both_views``, also :math:`D(p_2, \tilde z_1), D(p_1, \tilde z_2)`.
        no_mask: with ``both_views``, also :math:`D(p_1, z_2), D(p_2, z_1)`.
        both_mask: with ``both_views``, also :math:`D(\tilde p_1, \tilde z_2),
            D(\tilde p_2, \tilde z_1)`.

    The three switches are on by default, as in the authors' command line; their ImageNet100-S
    script turns ``symmetry_mask`` off.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Chen, He: Exploring Simple Siamese Representation Learning, CVPR 2021.
    """

    def __init__(
        self,
        network: nn.Module,
        predictor: nn.Module,
        *,
        both_views: bool = False,
        symmetry_mask: bool = True,
        no_mask: bool = True,
        both_mask: bool = True,
    ) -> None:
        super().__init__(network)
        check_switch("both_views", both_views)
        switches = {"symmetry_mask": symmetry_mask, "no_mask": no_mask, "both_mask": both_mask}
        for name, value in switches.items():
            check_switch(name, value)
            if not value and not both_views:
                raise ValueError(
                    f"{name}: it selects pairs of two masked views, got False with one masked "
                    "view. Pass both_views=True."
                )
        self.predictor, self.both_views = _module(predictor), both_views
        self.symmetry_mask, self.no_mask, self.both_mask = symmetry_mask, no_mask, both_mask

    def embed(self, images: Tensor) -> tuple[Tensor, ...]:
        z = self.network(images)
        return self.predictor(z), z.detach()

    def loss(self, one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> Tensor:
        return -(_cosine(one[0], two[1]) + _cosine(two[0], one[1])) / 2

    def compare(
        self, whole: Sequence[tuple[Tensor, ...]], masked: Sequence[tuple[Tensor, ...]]
    ) -> Tensor:
        if not self.both_views:
            return super().compare(whole, masked)
        pairs = [(masked, whole)]  # predictions, targets
        if self.symmetry_mask:
            pairs.append((whole, masked))
        if self.no_mask:
            pairs.append((whole, whole))
        if self.both_mask:
            pairs.append((masked, masked))
        cosines = [_cosine(p[i][0], z[1 - i][1]) for p, z in pairs for i in (0, 1)]
        return -torch.stack(cosines).mean()


class BYOL(Objective):
    r"""Each view predicts the output of a slow copy of the network for the other view:
    :math:`(2 - 2\cos(p_1, t_2)) + (2 - 2\cos(p_2, t_1))`, the mean over images.

    At the end of each step of `ADIOS`, after the masker's, the copy's parameters move:
    :math:`\theta' \leftarrow m\theta' + (1-m)\theta`; its running statistics come from its own
    forwards. With ``total_steps`` T the step k (from 0) has

    .. math:: m_k = 1 - (1 - m)\,\tfrac12\bigl(\cos(\pi k / T) + 1\bigr),

    from m to 1, the authors' schedule; their trainer skips the first step, and is one step behind
    after it.

    Args:
        network: images -> ``[B, E]``: the encoder and its projection head.
        predictor: ``[B, E]`` -> p ``[B, E]``.
        momentum: m. The default is the first value in the command line of YugeTen/adios.
        total_steps: T, the steps of the whole run. None: m stays constant. `ADIOS` counts the
            steps, and saves the count in its ``state_dict``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Reference:
        Grill et al.: Bootstrap Your Own Latent, NeurIPS 2020.
    """

    def __init__(
        self,
        network: nn.Module,
        predictor: nn.Module,
        momentum: float = 0.99,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(network)
        check_share("momentum", momentum)
        if total_steps is not None:
            check_steps("total_steps", total_steps)
        self.predictor, self.momentum = _module(predictor), momentum
        self.total_steps = total_steps
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
        rate = 1 - self.momentum
        if self.total_steps is not None:
            done = min(self.steps / self.total_steps, 1.0)
            rate *= (math.cos(math.pi * done) + 1) / 2
        foreach_lerp_(slow, fast, rate)


def _cosine(one: Tensor, two: Tensor) -> Tensor:
    return F.cosine_similarity(to_statistics_dtype(one), to_statistics_dtype(two)).mean()


def _module(predictor: Any) -> nn.Module:
    if not isinstance(predictor, nn.Module):
        raise TypeError(f"predictor: expected an nn.Module, got {type(predictor).__name__}.")
    return predictor
