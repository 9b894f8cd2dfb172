"""PCGrad with one forward for each domain, so that batch norm normalises a domain by itself."""

import torch
from torch import nn
from torch.nn import functional as F

import fastdg

from . import data


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * 16, 2),
    )
    loaders = data.by_domain()
    opt = fastdg.PCGrad(torch.optim.Adam(model.parameters(), lr=1e-3), num_domains=len(loaders))

    for batches in zip(*loaders, strict=True):  # a batch of each domain
        opt.zero_grad()
        for d, (x, y, domain) in enumerate(batches):
            losses = F.cross_entropy(model(x), y, reduction="none")
            # The graph of a domain is freed at once: the memory of one forward, not of all
            opt.backward(losses, domain, final=d == len(batches) - 1)
        opt.step()
    print("cosines between the domains' gradients:", opt.statistics["cosine"], sep="\n")


if __name__ == "__main__":
    main()
