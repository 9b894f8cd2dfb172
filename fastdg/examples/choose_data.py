"""Choose training data for a camera with few labels: samples, as TracIn, and domains, as DoGE."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdg

from . import data


def trained(x: Tensor, y: Tensor, steps: int = 40) -> nn.Module:
    """Train plainly on these samples."""
    torch.manual_seed(0)
    model = data.network()
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        rows = torch.randint(len(y), (48,))
        opt.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        opt.step()
    return model


def influences(x: Tensor, y: Tensor, few: Tensor, labels: Tensor, steps: int = 12) -> Tensor:
    """How much a step on each sample would lower the loss of the few, summed over the steps."""
    torch.manual_seed(0)
    model = data.network()
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    influence = torch.zeros(len(y))
    for _ in range(steps):
        losses = F.cross_entropy(model(few), labels, reduction="none")
        direction = fastdg.domain_gradients(losses, torch.zeros_like(labels), params=model)
        losses = F.cross_entropy(model(x), y, reduction="none")
        influence += fastdg.per_sample_products(losses, direction, params=model).squeeze(1)
        opt.zero_grad()
        losses.mean().backward()
        opt.step()
    return influence


class DomainWeights(nn.Module):
    """A weighting whose last domain is the target: it trains nothing, and its agreement with the
    others raises their weights from step to step (Fan, Pagliardini, Jaggi, ICML 2024)."""

    logits: Tensor

    def __init__(self, domains: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("logits", torch.zeros(domains))  # saved in opt.state_dict()

    def forward(self, gram: Tensor) -> Tensor:
        lengths = gram.diagonal().sqrt()
        self.logits += self.rate * gram[:-1, -1] / (lengths[:-1].mean() * lengths[-1])
        return F.pad(self.logits.softmax(0), (0, 1))


def main() -> None:
    x, y, _ = data.training_set(300).tensors
    few, labels = data.images(data.MISLEADING, 64, seed=3)

    best = influences(x, y, few, labels).argsort(descending=True)[: len(y) // 2]
    half = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: len(y) // 2]
    for name, rows in (("all samples", slice(None)), ("a random half", half), ("the best", best)):
        accuracy = data.accuracy(trained(x[rows], y[rows]), *data.unseen())
        print(f"trained on {name}: {accuracy:.0f} % on the new camera")

    torch.manual_seed(0)
    model, weighting = data.network(), DomainWeights(len(data.CAMERAS), rate=0.1)
    opt = fastdg.GramSurgery(torch.optim.Adam(model.parameters(), 3e-3), weighting)
    for images, targets, cameras in data.mixed():
        domain = torch.cat([cameras, torch.full_like(labels, len(data.CAMERAS))])
        logits = model(torch.cat([images, few]))
        opt.zero_grad()
        opt.backward(
            F.cross_entropy(logits, torch.cat([targets, labels]), reduction="none"), domain
        )
        opt.step()
    shares = weighting.logits.softmax(0)
    print(", ".join(f"{c}: weight {w:.2f}" for c, w in zip(data.CAMERAS, shares, strict=True)))


if __name__ == "__main__":
    main()
