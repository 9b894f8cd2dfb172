"""A checkpoint in the middle of a run, and a run that goes on from it bit for bit."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import fastdg

from . import data


def train(steps: range, file: Path | None = None) -> list[Tensor]:
    """The weights after these steps, which begin from ``file`` if they do not begin at 0."""
    torch.manual_seed(0)
    model = data.network()
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    opt = fastdg.Fishr(base, anneal_steps=4)
    if steps.start and file is not None:
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])  # Adam's moments, Fishr's history, settings and steps
    for step, (x, y, domain) in enumerate(data.mixed()):
        if step in steps:
            losses = F.cross_entropy(model(x), y, reduction="none")
            opt.zero_grad()
            opt.backward(losses, domain)
            opt.step()
    if file is not None:
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    return list(model.parameters())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "checkpoint.pt")
        train(range(0, 5), file)
        resumed = train(range(5, 8), file)
    whole = train(range(0, 8))
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))
    print("resumed after 5 of 8 steps: the same weights, bit for bit")


if __name__ == "__main__":
    main()
