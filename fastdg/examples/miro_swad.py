"""MIRO inside Fishr inside SWAD: near a pre-trained network, and averaged over the valley."""

import torch
from torch.nn import functional as F

import fastdg

from . import data


def main() -> None:
    torch.manual_seed(0)
    model = data.network()  # stands for one with pre-trained weights
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    # Layers of torchvision's, timm's and transformers' networks are found without names
    miro = fastdg.MIRO(adam, model, layers=["2", "5"], weight=0.1)
    fishr = fastdg.Fishr(miro, penalty_weight=100.0, anneal_steps=16)
    opt = fastdg.SWAD(fishr, model, n_converge=2, n_tolerance=3)
    held_out = data.images(data.TINTS[0], 256, seed=5)

    while not opt.finished and opt.steps < 64:
        for x, y, domain in data.mixed(count=256, batch_size=96):
            losses = F.cross_entropy(model(x), y, reduction="none")
            opt.zero_grad()
            opt.backward(losses, domain)  # one backward for all of them
            opt.step()
        with torch.no_grad():
            opt.evaluate(F.cross_entropy(model(held_out[0]), held_out[1]))
    opt.apply()  # the averaged weights, for good
    accuracy = data.accuracy(model, *data.unseen())
    print(f"after {opt.steps} steps, averaged: {accuracy:.0f} % on a new camera")


if __name__ == "__main__":
    main()
