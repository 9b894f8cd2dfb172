"""The backbone that MIRO wants, pre-trained without labels: by how many quarter turns is an image
turned?

Reference:
    Gidaris, Singh, Komodakis: Unsupervised Representation Learning by Predicting Image Rotations,
    ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 200
BATCH = 64
LR = 1e-3
TURNS = 4


def pretrain(model: nn.Sequential, images: Sequence[Tensor], seed: int) -> None:
    """Train all layers of ``model`` but the last on the images, in place. Deterministic.

    Args:
        model: ends in the linear layer that the labels are for, which is left as it is.
        images: of each training domain, ``[n, C, 8, 8]``.
        seed: of the order of the images, and of the layer that predicts the turns.
    """
    x = torch.cat(list(images))
    generator = torch.Generator().manual_seed(seed)
    *body, last = model
    assert isinstance(last, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        telling = nn.Linear(last.in_features, TURNS)
    network = nn.Sequential(*body, telling)
    opt = torch.optim.Adam(network.parameters(), lr=LR)
    turns = torch.arange(TURNS).repeat_interleave(BATCH // TURNS)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        turned = torch.cat([x[rows[k::TURNS]].rot90(k, (2, 3)) for k in range(TURNS)])
        opt.zero_grad()
        F.cross_entropy(network(turned), turns).backward()
        opt.step()
