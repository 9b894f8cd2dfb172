"""For research: statistics of a network's gradients, without any optimizer."""

import torch
from torch.nn import functional as F

import fastdg

from . import data


def main() -> None:
    torch.manual_seed(0)
    model = data.network()
    x, y, domain = next(iter(data.mixed(batch_size=96)))
    with fastdg.record(model, params="all") as tape:
        losses = F.cross_entropy(model(x), y, reduction="none")

    moments = fastdg.domain_moments(tape, losses, domain)  # .mean, .variance: name -> (D, *shape)
    for name, variance in moments.variance.items():
        each = ", ".join(f"{value:.1e}" for value in variance.flatten(1).mean(1))
        print(f"variance of {name}: {each}")

    gram = fastdg.domain_gram(tape, losses, domain)  # [D, D]
    norms = gram.diagonal().sqrt()
    print("cosines between the domains:", gram / norms / norms[:, None], sep="\n")

    norms = fastdg.per_sample_norms(tape, losses)  # [N], no gradient of a sample is formed
    hardest = norms.topk(3).indices
    print(f"samples with the largest gradients: {hardest.tolist()} of cameras {domain[hardest]}")


if __name__ == "__main__":
    main()
