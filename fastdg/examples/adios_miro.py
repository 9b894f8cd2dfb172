"""ADIOS trains an encoder without labels; MIRO then keeps a classifier near its features."""

import torch
from torch import nn
from torch.nn import functional as F

import fastdg

from . import data


def main() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 16),
    )
    objective = fastdg.SimCLR(encoder)
    masker = fastdg.UNetMasker(masks=2, width=8, depth=2)
    adios = fastdg.ADIOS(
        torch.optim.SGD(objective.parameters(), lr=0.05),
        torch.optim.SGD(masker.parameters(), lr=0.01),
        masker,
        objective=objective,
    )
    for x, _, _ in data.mixed(count=64, batch_size=32):
        statistics = adios.step(x, x.flip(-1))  # two views of each image; the second is masked
    print(f"ADIOS: loss {statistics['loss']:.3f}")

    model = nn.Sequential(encoder, nn.ReLU(), nn.Linear(16, 2))
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    opt = fastdg.MIRO(base, model, layers=["0.2", "0.4"])  # near the encoder as it is now
    for x, y, domain in data.mixed():
        losses = F.cross_entropy(model(x), y, reduction="none")
        opt.zero_grad()
        opt.backward(losses, domain)
        opt.step()
    accuracy = data.accuracy(model, *data.unseen())
    print(f"MIRO: its term is {opt.statistics['miro']:.3f}; {accuracy:.0f} % on a new camera")


if __name__ == "__main__":
    main()
